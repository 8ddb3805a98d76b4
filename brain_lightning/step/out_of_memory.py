"""A batch for which there is no memory: how to know it, what is said of it, what is freed."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import islice
from reprlib import Repr
from typing import Any

import torch
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error
from torch import Tensor

from brain_lightning.compat.versions import add_note

_short = Repr()
_short.maxlist = 8
# Of a batch: so many of its tensors are named, so deep in its collections.
MOST_TENSORS = 16
DEEPEST = 3
ALLOCATED = "brain_lightning: memory of"
GIB = 2**30


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory, on the device or on the host.

    Args:
        error: Any error.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # Lightning looks for words in it.
    in_words = len(error.args) == 1 and isinstance(error.args[0], str)
    return in_words and is_oom_error(error)


def note_memory(error: BaseException, device: str) -> None:
    """Adds to an error how much of a GPU's memory was taken, once.

    Args:
        error: The error, before anything is freed.
        device: The device of the Brain.
    """
    if torch.device(device).type != "cuda" or any(
        n.startswith(ALLOCATED) for n in notes(error)
    ):
        return
    # Whatever goes wrong here must not hide the error.
    with suppress(Exception):
        sizes = (
            torch.cuda.memory_allocated(device),
            torch.cuda.memory_reserved(device),
            torch.cuda.get_device_properties(device).total_memory,
        )
        allocated, reserved, total = (f"{size / GIB:.2f} GiB" for size in sizes)
        add_note(
            error,
            f"{ALLOCATED} {device}: {allocated} allocated, {reserved} reserved, of {total}",
        )


def note_batch(error: BaseException, batch: Any) -> None:
    """Adds to an error the shapes and the lengths in a batch.

    Args:
        error: The error.
        batch: What the loader gave.
    """
    with suppress(Exception):
        found = list(islice(_tensors(batch, "", 0), MOST_TENSORS))
        if found:
            add_note(error, f"brain_lightning: the batch has {', '.join(found)}")


def notes(error: BaseException) -> list[str]:
    """What was added to an error.

    Args:
        error: Any error.
    """
    return list(getattr(error, "__notes__", None) or ())


def free(error: BaseException, device: str) -> None:
    """Frees what the calls that have failed hold, else there is no memory to go on with.

    Args:
        error: The error; what functions that it has left had in their variables is gone.
        device: The device of the Brain.
    """
    note_memory(error, device)
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)
        each = each.__context__
    garbage_collection_cuda()


def _tensors(value: Any, name: str, depth: int) -> Iterable[str]:
    """Each tensor of a batch with its name and shape; lengths with their values."""
    if isinstance(value, Tensor):
        yield f"{name or 'a tensor'} {tuple(value.shape)}" + _lengths(value, name)
    elif depth < DEEPEST:
        for key, each in _items(value):
            yield from _tensors(each, f"{name}.{key}" if name else str(key), depth + 1)


def _lengths(value: Tensor, name: str) -> str:
    """Of SpeechBrain's PaddedData, or a tensor that is named so."""
    is_length = value.dim() == 1 and "len" in name.rpartition(".")[2]
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
