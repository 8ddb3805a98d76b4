"""A batch for which there is no memory: how to know it, what is said of it, what is freed."""

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
        allocated, reserved, total = map(in_gib, sizes)
        add_note(
            error,
            f"{ALLOCATED} {device}: {allocated} allocated, {reserved} reserved, of {total}",
        )


def in_gib(count: int) -> str:
    """An amount of memory in words.

    Args:
        count: Bytes.
    """
    return f"{count / 2**30:.2f} GiB"


def note_batch(error: BaseException, batch: Any) -> None:
    """Adds to an error the shapes and the lengths in a batch.

    Args:
        error: The error.
        batch: What the loader gave.
    """
    with suppress(Exception):
        if found := described(batch):
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
