"""The hyperparameters of a run, as loggers take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from brain_lightning.protocol import BrainProtocol, hparams_of

PLAIN = (bool, int, float, str, type(None))
# What has more entries is data, such as a list of words.
LONGEST = 100
# Known by what they print: a folder, cpu, torch.float32.
TEXTS = (PurePath, torch.device, torch.dtype)


def hyperparameters(brain: BrainProtocol) -> dict[str, Any]:
    """The plain values among the hyperparameters of a Brain.

    Args:
        brain: The Brain.

    Returns:
        Numbers, texts (of paths and devices, too) and lists of them by name; those within
        others have joined names, as Lightning's loggers join them: ``optimizer/lr``. Objects
        are left out.
    """
    return dict(_plain("", dict(hparams_of(brain))))


def _scalar(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, TEXTS) else value


def _plain(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    value = _scalar(value)
    if type(value) in PLAIN:
        yield name, value
    elif isinstance(value, (list, tuple)) and len(value) <= LONGEST:
        scalars = [_scalar(each) for each in value]
        if all(type(each) in PLAIN for each in scalars):
            # YAML has no tuples.
            yield name, scalars
        elif all(isinstance(each, Mapping) for each in value):
            for index, each in enumerate(value):
                yield from _plain(f"{name}/{index}", each)
    elif isinstance(value, Mapping) and (not name or len(value) <= LONGEST):
        for key, each in value.items():
            yield from _plain(f"{name}/{key}" if name else str(key), each)
