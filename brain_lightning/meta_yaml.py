"""The YAML file of a checkpoint: plain values, and tensors without running any code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from .errors import CheckpointError

# As PyYAML's own loader of anything would have it, which SpeechBrain's newest uses.
TENSOR_TAG = "tag:yaml.org,2002:python/object/apply:torch.tensor"


class _Dumper(yaml.SafeDumper):
    """Plain values, and tensors."""


class _Loader(yaml.SafeLoader):
    """Plain values, and tensors."""


def _represent_tensor(dumper: Any, tensor: torch.Tensor) -> Any:
    values = tensor.detach().cpu().tolist()
    return dumper.represent_sequence(TENSOR_TAG, [values])


def _construct_tensor(loader: Any, node: Any) -> torch.Tensor:
    return torch.tensor(*loader.construct_sequence(node, deep=True))


_Dumper.add_representer(torch.Tensor, _represent_tensor)
_Loader.add_constructor(TENSOR_TAG, _construct_tensor)


def _plain(value: Any) -> Any:
    """Numbers of any library become Python's, which every SpeechBrain can read."""
    if isinstance(value, torch.Tensor) and value.numel() > 1:
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value.item() if hasattr(value, "item") else value


def dump_meta(meta: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Writes what is said about a checkpoint.

    Args:
        meta: Values by name.
        path: The file.

    Returns:
        The values as they will be read.

    Raises:
        CheckpointError: One of them is no plain value.
    """
    plain: dict[str, Any] = _plain(meta)
    try:
        text = yaml.dump(plain, Dumper=_Dumper)
    except yaml.representer.RepresenterError as error:
        raise CheckpointError(
            f"the meta of a checkpoint holds numbers, texts, lists and dicts: {error}"
        ) from error
    path.write_text(f"# yamllint disable\n{text}", encoding="utf-8")
    return plain


def load_meta(path: Path) -> dict[str, Any]:
    """Reads what is said about a checkpoint.

    Args:
        path: The file.

    Returns:
        Values by name.

    Raises:
        CheckpointError: It is damaged, or would run code.
    """
    try:
        meta = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506  safe
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(meta, dict) or not {"unixtime", "end-of-epoch"} <= meta.keys():
        raise CheckpointError(f"{path} is not the meta file of a checkpoint")
    return meta
