"""What is in a batch, whatever class it is of: its tensors, and how they are described."""

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
# Of a batch: so many of its tensors are described, so deep in its collections.
MOST_TENSORS = 16
DEEPEST = 4


def tensors_of_batch(
    batch: Any, name: str = "", depth: int = 0
) -> Iterator[tuple[str, Tensor | np.ndarray]]:
    """The tensors of an example or of a batch, each with where it is.

    Args:
        batch: A tensor, or dicts, lists and tuples of them, or an object that has such
            attributes, as SpeechBrain's ``PaddedBatch`` or a dataclass.
        name: Where the batch is.
        depth: How deep that is.

    Yields:
        Expressions, such as ``sig.data``, and tensors.
    """
    if isinstance(batch, (Tensor, np.ndarray)):
        yield name, batch
    elif depth < DEEPEST:
        for key, value in _parts(batch):
            yield from tensors_of_batch(
                value, f"{name}.{key}" if name else f"{key}", depth + 1
            )


def described(batch: Any) -> list[str]:
    """The tensors of a batch in words: name and shape, and the numbers of lengths.

    Args:
        batch: See ``tensors_of_batch``.
    """
    found = islice(tensors_of_batch(batch), MOST_TENSORS)
    return [f"{n or 'a tensor'} {tuple(t.shape)}{_numbers(n, t)}" for n, t in found]


def ids_of(batch: Any) -> str:
    """``batch.id``, as SpeechBrain's PaddedBatch has it, or ``batch["id"]``, cut short.

    Args:
        batch: What a loader gave.

    Returns:
        Nothing where there is none.
    """
    # It is asked for where an error is described, which must not be hidden by another one.
    with suppress(Exception):
        ids = batch.get("id") if isinstance(batch, Mapping) else getattr(batch, "id", None)
        if ids is not None:
            return shortened(ids.tolist() if hasattr(ids, "tolist") else ids)
    return ""


def shortened(value: Any) -> str:
    """The ``repr`` of a value, cut short.

    Args:
        value: Any value.
    """
    return _short.repr(value)


def _numbers(name: str, tensor: Tensor | np.ndarray) -> str:
    """Of SpeechBrain's PaddedData, or a tensor that is named so."""
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
