"""Finds and describes the tensors in a batch of any type."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from reprlib import Repr
from typing import Any

import numpy as np
from torch import Tensor

_short = Repr()
_short.maxlist = _short.maxtuple = 8
_short.maxstring = _short.maxother = 80
# Limits: how many tensors of a batch are described, and to what depth of its collections.
MOST_TENSORS = 16
DEEPEST = 4


def tensors_of_batch(
    batch: Any, name: str = "", depth: int = 0
) -> Iterator[tuple[str, Tensor | np.ndarray]]:
    """Yields the tensors of an example or a batch with their names.

    Args:
        batch: A tensor, or a dict, list or tuple of tensors, or an object with such
            attributes, such as SpeechBrain's ``PaddedBatch`` or a dataclass.
        name: Name of ``batch`` in the batch that contains it.
        depth: Number of collections around ``batch``.

    Yields:
        The name, such as ``sig.data``, and the tensor.
    """
    if isinstance(batch, (Tensor, np.ndarray)):
        yield name, batch
    elif depth < DEEPEST:
        for key, value in _parts(batch):
            yield from tensors_of_batch(
                value, f"{name}.{key}" if name else f"{key}", depth + 1
            )


def described(batch: Any) -> list[str]:
    """Describes the tensors of a batch: name and shape, and the values of lengths.

    Args:
        batch: See ``tensors_of_batch``.
    """
    found = islice(tensors_of_batch(batch), MOST_TENSORS)
    return [f"{n or 'a tensor'} {tuple(t.shape)}{_numbers(n, t)}" for n, t in found]


def ids_of(batch: Any) -> str:
    """Returns ``batch.id``, as in SpeechBrain's PaddedBatch, or ``batch["id"]``, shortened.

    Args:
        batch: Batch as the DataLoader returned it.

    Returns:
        The ids as a string. Empty if the batch has no ids.
    """
    # Called while an error is described. Another error must not hide that error.
    with suppress(Exception):
        ids = batch.get("id") if isinstance(batch, Mapping) else getattr(batch, "id", None)
        if ids is not None:
            return shortened(ids.tolist() if hasattr(ids, "tolist") else ids)
    return ""


def shortened(value: Any) -> str:
    """Returns the ``repr`` of a value, shortened.

    Args:
        value: Any value.
    """
    return _short.repr(value)


def _numbers(name: str, tensor: Tensor | np.ndarray) -> str:
    """Returns the values of lengths, as in SpeechBrain's PaddedData, or an empty string."""
    is_length = tensor.ndim == 1 and "len" in name.rpartition(".")[2]
    return f" = {shortened([round(n, 4) for n in tensor.tolist()])}" if is_length else ""


def _parts(batch: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(batch, Mapping):
        return batch.items()
    if hasattr(batch, "_asdict"):
        return batch._asdict().items()  # type: ignore[no-any-return]
    if isinstance(batch, (list, tuple)):
        return enumerate(batch)
    own = getattr(batch, "__dict__", {})
    return [(key, value) for key, value in own.items() if not key.startswith("_")]
