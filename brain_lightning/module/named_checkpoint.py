"""The checkpoint directory that a user names, in place of the best or the newest one."""

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

# An error names as many.
CHOICES = 8


class Recovery(Enum):
    """What ``evaluate`` recovers where no checkpoint is named."""

    BY_KEYS = "by max_key or min_key, else the newest"


def is_directory(ckpt_path: Any) -> bool:
    """Whether a ``ckpt_path`` of a Trainer's is a checkpoint directory of a Brain.

    Args:
        ckpt_path: What the Trainer was given; by its name, for it may not be there.
    """
    if not isinstance(ckpt_path, (str, os.PathLike)):
        return False
    path = Path(ckpt_path)
    return path.name.startswith(f"{CKPT_PREFIX}+") and not path.is_file()


def named_checkpoint(brain: BrainProtocol, named: str | os.PathLike[str]) -> Checkpoint:
    """Finds a checkpoint directory.

    Args:
        brain: Its Checkpointer says in which folder, and what is recovered from it.
        named: A name in the folder, with or without ``CKPT+``, or a path.

    Raises:
        NoSuchCheckpointError: There is none of that name.
    """
    checkpointer = brain.checkpointer
    if not hasattr(checkpointer, "checkpoints_dir"):
        raise NoSuchCheckpointError(
            f"the checkpoint {os.fspath(named)!r} was asked for, and the Brain has no "
            "Checkpointer, which knows what to recover from it: give it one"
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
        f"there is no checkpoint {os.fspath(named)!r}, neither in {folder} nor as a path; "
        f"there are, the newest first: {choices or 'none'}"
    )


@contextmanager
def recovering(brain: BrainProtocol, checkpoint: Checkpoint | None) -> Iterator[None]:
    """Makes a checkpoint the only one that the Brain's Checkpointer finds.

    ``on_fit_start`` and ``on_evaluate_start`` then recover it, by whatever key they choose.

    Args:
        brain: The Brain.
        checkpoint: The checkpoint; None changes nothing.

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
        # The recipe's own hook recovers nothing.
        checkpointer.load_checkpoint(checkpoint)
