"""Recovers a checkpoint directory that the user names, instead of the best or newest one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from brain_lightning.checkpoints.atomic_directory import CKPT_PREFIX
from brain_lightning.checkpoints.checkpoint import (
    Checkpoint,
    checkpoint_in,
    ckpt_recency,
    saved_in,
)
from brain_lightning.checkpoints.checkpointer import Checkpointer
from brain_lightning.errors import NoSuchCheckpointError
from brain_lightning.protocol import BrainProtocol
from brain_lightning.temporary import TemporaryAttributes

# How many checkpoints an error message lists.
CHOICES = 8


class Recovery(Enum):
    """The checkpoint that ``evaluate`` recovers if the user names none."""

    BY_KEYS = "by max_key or min_key, else the newest"


def is_directory(ckpt_path: Any) -> bool:
    """Whether the ``ckpt_path`` of a Trainer is a checkpoint directory of a Brain.

    Args:
        ckpt_path: The argument of the Trainer. Its name decides, because the directory may
            not exist.
    """
    if not isinstance(ckpt_path, (str, os.PathLike)):
        return False
    path = Path(ckpt_path)
    return path.name.startswith(f"{CKPT_PREFIX}+") and not path.is_file()


def named_checkpoint(brain: BrainProtocol, named: str | os.PathLike[str]) -> Checkpoint:
    """Finds a checkpoint directory.

    Args:
        brain: The Brain, whose Checkpointer has the folder and the recoverables.
        named: A name in the folder, with or without ``CKPT+``, or a path.

    Returns:
        The checkpoint.

    Raises:
        NoSuchCheckpointError: If there is no checkpoint of this name or path.
    """
    checkpointer = brain.checkpointer
    if not hasattr(checkpointer, "checkpoints_dir"):
        raise NoSuchCheckpointError(
            f"cannot recover the checkpoint {os.fspath(named)!r}, because the Brain has no "
            "Checkpointer. Pass a Checkpointer to the Brain."
        )
    if isinstance(checkpointer, Checkpointer):
        checkpointer.wait()
    folder = Path(checkpointer.checkpoints_dir)
    for path in (folder / named, folder / f"{CKPT_PREFIX}+{named}", Path(named)):
        found = checkpoint_in(path.absolute())
        if found is not None:
            return found
    newest_first = sorted(saved_in(folder), key=ckpt_recency, reverse=True)
    choices = ", ".join(each.path.name for each in newest_first[:CHOICES])
    raise NoSuchCheckpointError(
        f"there is no checkpoint {os.fspath(named)!r}, neither in {folder} nor as a path. "
        f"Available checkpoints, the newest first: {choices or 'none'}."
    )


@contextmanager
def recovering(brain: BrainProtocol, checkpoint: Checkpoint | None) -> Iterator[None]:
    """Makes the Brain's Checkpointer find only the given checkpoint.

    ``on_fit_start`` and ``on_evaluate_start`` then recover it, with any key.

    Args:
        brain: The Brain.
        checkpoint: The checkpoint; None has no effect.

    Yields:
        None
    """
    if checkpoint is None:
        yield
        return
    checkpointer: Any = brain.checkpointer
    is_found = False

    def find_checkpoints(*_: Any, **__: Any) -> list[Checkpoint]:
        nonlocal is_found
        is_found = True
        return [checkpoint]

    with TemporaryAttributes() as temporary:
        temporary.override(checkpointer, "find_checkpoints", find_checkpoints)
        yield
    if not is_found:
        # The recipe overrides the hook and recovers nothing.
        checkpointer.load_checkpoint(checkpoint)
