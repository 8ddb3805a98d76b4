"""``FSDP2Strategy(sharded_checkpoints=True)``: checks the checkpointer and its folder."""

from __future__ import annotations

from pathlib import Path

from brain_lightning.checkpoints import atomic_directory
from brain_lightning.checkpoints.checkpointer import Checkpointer
from brain_lightning.distributed.communication import (
    collectively,
    ddp_broadcast,
    if_main_process,
)
from brain_lightning.errors import UnsupportedError
from brain_lightning.fsdp2.sharded_files import check_is_shared
from brain_lightning.protocol import BrainProtocol
from brain_lightning.temporary import TemporaryAttributes

OPTION = "FSDP2Strategy(sharded_checkpoints=True)"


def reconcile_sharded_checkpoints(
    brain: BrainProtocol, temporary: TemporaryAttributes
) -> None:
    """Makes the Brain's Checkpointer write shards, if the strategy has the option.

    Args:
        brain: The Brain that is about to run.
        temporary: Records the changes.

    Raises:
        UnsupportedError: If the Brain's checkpointer cannot write shards.
    """
    if not _is_asked_for(brain):
        return
    checkpointer = brain.checkpointer
    if checkpointer is None:
        raise UnsupportedError(
            f"{OPTION} has no effect without a checkpointer. Pass a Checkpointer to the Brain."
        )
    if not isinstance(checkpointer, Checkpointer):
        raise UnsupportedError(
            f"{OPTION} needs a brain_lightning.Checkpointer, but the checkpointer is a "
            f"{type(checkpointer).__module__}.{type(checkpointer).__qualname__}. Use "
            "brain_lightning.Checkpointer: it takes the same arguments."
        )
    if checkpointer.async_save:
        raise UnsupportedError(
            f"async_save and {OPTION} cannot be used together, because ranks that write "
            "shards wait for each other. Remove one of them."
        )
    temporary.set(checkpointer, "writes_shards", True)


def check_folder(brain: BrainProtocol) -> None:
    """Raises on all ranks if they write shards to a folder that they do not share.

    Args:
        brain: The Brain that is about to run, in a process group.

    Raises:
        UnsupportedError: If the ranks do not share the folder of checkpoints.
    """
    if not _is_asked_for(brain):
        return
    folder = Path(brain.checkpointer.checkpoints_dir)

    def new_directory() -> Path | None:
        return atomic_directory.new_directory(folder) if if_main_process() else None

    directory: Path = ddp_broadcast(collectively(new_directory))
    try:
        check_is_shared(directory)
    finally:
        if if_main_process():
            atomic_directory.remove(directory)


def _is_asked_for(brain: BrainProtocol) -> bool:
    sharding = brain._lightning.sharding
    return sharding is not None and sharding.sharded_checkpoints
