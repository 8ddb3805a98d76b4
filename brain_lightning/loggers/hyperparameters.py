"""Converts the hyperparameters of a run for loggers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from brain_lightning.protocol import BrainProtocol, hparams_of

PLAIN = (bool, int, float, str, type(None))
# Lists with more entries are data, such as a list of words, and are not logged.
LONGEST = 100
# Types that are logged as strings, such as "cpu" or "torch.float32".
TEXTS = (PurePath, torch.device, torch.dtype)


def hyperparameters(brain: BrainProtocol) -> dict[str, Any]:
    """Returns the plain values among the hyperparameters of a Brain.

    Args:
        brain: The Brain.

    Returns:
        Numbers, strings, and lists of them by name. Paths, devices and dtypes are converted to
        strings. Nested values have joined names, as in Lightning's loggers: ``optimizer/lr``.
        Other objects are left out.
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
            # A list, because YAML has no tuples.
            yield name, scalars
        elif all(isinstance(each, Mapping) for each in value):
            for index, each in enumerate(value):
                yield from _plain(f"{name}/{index}", each)
    elif isinstance(value, Mapping) and (not name or len(value) <= LONGEST):
        for key, each in value.items():
            yield from _plain(f"{name}/{key}" if name else str(key), each)
