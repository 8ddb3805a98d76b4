"""The YAML meta file of a checkpoint: plain values and tensors, read without running code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
import yaml

from brain_lightning.errors import CheckpointError

METAFNAME = "CKPT.yaml"
# Comment with the names of lists that were tensors. SpeechBrain's reader ignores it.
TENSORS = "# tensors: "


class _Loader(yaml.SafeLoader):
    """Safe YAML loader that also reads the tuples that SpeechBrain writes."""


def _construct_tuple(loader: Any, node: Any) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _construct_tuple)


def _plain(value: Any) -> Any:
    """Converts numbers of any library to Python numbers, which SpeechBrain can read."""
    if isinstance(value, Mapping):
        return {_plain(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, PurePath):
        return str(value)
    return value.tolist() if hasattr(value, "tolist") else value


def dump_meta(meta: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Writes the meta file of a checkpoint.

    Args:
        meta: Values by name.
        path: The file.

    Returns:
        The values as ``load_meta`` will read them.

    Raises:
        CheckpointError: A value is not plain.
    """
    plain: dict[str, Any] = _plain(meta)
    tensors = [n for n, v in meta.items() if isinstance(v, torch.Tensor) and v.numel() != 1]
    try:
        text = yaml.safe_dump(plain)
    except yaml.representer.RepresenterError as error:
        raise CheckpointError(
            "the meta of a checkpoint may contain only numbers, strings, lists and dicts: "
            f"{error}"
        ) from error
    comment = f"# yamllint disable\n{TENSORS}{json.dumps(tensors)}\n"
    path.write_text(comment + text, encoding="utf-8")
    return _with_tensors(plain, tensors)


def _with_tensors(meta: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return meta | {name: torch.tensor(meta[name]) for name in names if name in meta}


def load_meta(path: Path) -> dict[str, Any]:
    """Reads the meta file of a checkpoint.

    Args:
        path: The file.

    Returns:
        Values by name.

    Raises:
        CheckpointError: The file is damaged, or would run code.
    """
    try:
        text = path.read_text(encoding="utf-8")
        meta = yaml.load(text, Loader=_Loader)  # noqa: S506  safe
        comment = re.search(f"^{TENSORS}(.*)$", text, re.MULTILINE)
        tensors = json.loads(comment[1]) if comment else []
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(meta, dict) or not {"unixtime", "end-of-epoch"} <= meta.keys():
        raise CheckpointError(f"{path} is not the meta file of a checkpoint")
    if not isinstance(meta["unixtime"], (int, float)):
        raise CheckpointError(f"{path} is damaged: unixtime is {meta['unixtime']!r}")
    return _with_tensors(meta, tensors)
