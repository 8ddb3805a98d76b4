"""``FSDP2Strategy(sharded_checkpoints=True)``: what it needs of a Brain, and of its disks."""

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
    """Lets the Brain's Checkpointer write shards, where the strategy says so.

    Args:
        brain: The Brain that is going to run.
        temporary: Records what is changed.

    Raises:
        UnsupportedError: Its Checkpointer cannot.
    """
    if not _is_asked_for(brain):
        return
    checkpointer = brain.checkpointer
    if checkpointer is None:
        raise UnsupportedError(f"{OPTION} saves nothing: give the Brain a checkpointer")
    if not isinstance(checkpointer, Checkpointer):
        raise UnsupportedError(
            f"{OPTION} needs brain_lightning.Checkpointer, and the checkpointer is a "
            f"{type(checkpointer).__module__}.{type(checkpointer).__qualname__}: its files "
            "and arguments are the same"
        )
    if checkpointer.async_save:
        raise UnsupportedError(
            f"async_save and {OPTION} exclude each other, for processes that write shards "
            "wait for each other: leave one of them out"
        )
    temporary.set(checkpointer, "writes_shards", True)


def check_folder(brain: BrainProtocol) -> None:
    """Refuses a folder of checkpoints that the processes do not share, all together.

    Args:
        brain: The Brain that is about to run, in a process group.

    Raises:
        UnsupportedError: It is not shared, and processes are to write to it together.
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
