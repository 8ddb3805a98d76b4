"""Out-of-memory errors: detect them, describe the batch, free what the failed calls hold."""

from __future__ import annotations

import traceback
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error

from brain_lightning.batch_content import described
from brain_lightning.compat.versions import add_note

ALLOCATED = "brain_lightning: memory of"


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error means that the device or the host is out of memory.

    Args:
        error: Any error.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # Lightning searches for phrases in the only argument of the error, a string.
    in_words = len(error.args) == 1 and isinstance(error.args[0], str)
    return in_words and is_oom_error(error)


def note_memory(error: BaseException, device: str) -> None:
    """Adds a note with the memory use of the GPU to an error, once.

    Args:
        error: The error, before any memory is freed.
        device: Device of the Brain.
    """
    if torch.device(device).type != "cuda" or any(
        n.startswith(ALLOCATED) for n in notes(error)
    ):
        return
    # An error in here must not hide the original error.
    with suppress(Exception):
        sizes = (
            torch.cuda.memory_allocated(device),
            torch.cuda.memory_reserved(device),
            torch.cuda.get_device_properties(device).total_memory,
        )
        allocated, reserved, total = map(in_gib, sizes)
        add_note(
            error,
            f"{ALLOCATED} {device}: {allocated} allocated, {reserved} reserved, of {total}",
        )


def in_gib(count: int) -> str:
    """Formats an amount of memory in GiB.

    Args:
        count: Number of bytes.
    """
    return f"{count / 2**30:.2f} GiB"


def note_batch(error: BaseException, batch: Any) -> None:
    """Adds a note with the shapes and lengths in a batch to an error.

    Args:
        error: The error.
        batch: Batch as the DataLoader returned it.
    """
    with suppress(Exception):
        if found := described(batch):
            add_note(error, f"brain_lightning: the batch has {', '.join(found)}")


def notes(error: BaseException) -> list[str]:
    """Returns the notes of an error.

    Args:
        error: Any error.
    """
    return list(getattr(error, "__notes__", None) or ())


def free(error: BaseException, device: str) -> None:
    """Frees the memory that the failed calls still hold, so that the run can continue.

    Args:
        error: The error. The local variables of the calls in its traceback are cleared.
        device: Device of the Brain.
    """
    note_memory(error, device)
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)
        each = each.__context__
    garbage_collection_cuda()
