"""Copies and restores values that can be saved and loaded without running code."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Saved values. Their names are part of the file format.
State = dict[str, Any]


class NotPlainError(TypeError):
    """A value cannot be loaded without running code."""


def plain(value: Any) -> Any:
    """Copies a value that consists of tensors, numbers, strings, lists and dicts.

    Args:
        value: The value.

    Returns:
        The copy. Numbers of numpy are converted to Python numbers.

    Raises:
        NotPlainError: The value contains an object of another type.
    """
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, np.generic):
        return plain(value.item())
    if type(value) is Tensor:
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(plain(each) for each in value)
    if type(value) in (dict, OrderedDict):
        return {plain(key): plain(each) for key, each in value.items()}
    raise NotPlainError(type(value).__name__)


def plain_or_none(value: Any) -> Any:
    """Copies a value like ``plain``, but returns None if the value is not plain.

    Args:
        value: The value.
    """
    try:
        return plain(value)
    except NotPlainError:
        return None


def plain_values(values: Mapping[str, Any]) -> State:
    """Copies the values that are plain, or containers of plain values. Ignores others.

    Args:
        values: Values by name.
    """
    found = {}
    for name, value in values.items():
        with contextlib.suppress(NotPlainError):
            found[name] = plain(_content(value))
    return found


def _content(value: Any) -> Any:
    """Returns the content of a container. The object to restore later has its type."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, set, deque)):
        return list(value)
    return value


def restore_attributes(owner: Any, values: State) -> None:
    """Restores the values of an object's attributes.

    A container or an array that the object has is filled in place. A tensor is replaced by a
    tensor on the same device.

    Args:
        owner: The object.
        values: Result of ``plain_values``.
    """
    own = vars(owner)
    for name, value in values.items():
        current = own.get(name)
        is_container = isinstance(current, (dict, set, list, deque))
        if isinstance(current, np.ndarray):
            current[...] = value.numpy()
        elif isinstance(current, Tensor) and isinstance(value, Tensor):
            own[name] = value.to(current.device)
        elif is_container and type(current) is not type(value):
            current.clear()
            fill = current.extend if isinstance(current, (list, deque)) else current.update
            fill(value)
        else:
            own[name] = value
