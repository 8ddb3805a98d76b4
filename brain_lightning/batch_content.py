"""The tensors in a batch or an example, whatever it is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from reprlib import Repr
from typing import Any

import numpy as np
from torch import Tensor

# So many tensors are described, and so deep in collections they are looked for.
MOST_TENSORS = 16
DEEPEST = 3

_short = Repr()
_short.maxlist = 8


def tensors_in(
    batch: Any, name: str = "", depth: int = 0
) -> Iterator[tuple[str, Tensor | np.ndarray]]:
    """The tensors of a batch or of an example, each with where it is.

    Args:
        batch: A tensor, or dicts, lists and tuples of them, or an object that has such
            attributes, as SpeechBrain's ``PaddedBatch``.
        name: Where the batch is.
        depth: In how many collections it is.

    Yields:
        Expressions, such as ``sig.data``, and tensors.
    """
    if isinstance(batch, (Tensor, np.ndarray)):
        yield name, batch
    elif depth < DEEPEST:
        for key, each in _items(batch):
            yield from tensors_in(each, f"{name}.{key}" if name else str(key), depth + 1)


def described(batch: Any) -> list[str]:
    """Each tensor of a batch, with its shape; lengths with their values.

    Args:
        batch: See ``tensors_in``.
    """
    return [
        f"{name or 'a tensor'} {tuple(tensor.shape)}" + _lengths(tensor, name)
        for name, tensor in islice(tensors_in(batch), MOST_TENSORS)
    ]


def _lengths(value: Tensor | np.ndarray, name: str) -> str:
    """Of SpeechBrain's PaddedData, or a tensor that is named so."""
    is_length = value.ndim == 1 and "len" in name.rpartition(".")[2]
    return f" = {_short.repr([round(n, 4) for n in value.tolist()])}" if is_length else ""


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return zip(value._fields, value, strict=True)
    if isinstance(value, (list, tuple)):
        return enumerate(value)
    # As SpeechBrain's PaddedBatch, or a dataclass.
    own = getattr(value, "__dict__", {})
    return [(key, each) for key, each in own.items() if not key.startswith("_")]
