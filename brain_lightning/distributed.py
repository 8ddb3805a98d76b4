"""Several processes that train one Brain: who this one is, and what all of them agree on.

Each function has no effect where there is one process only
(``speechbrain.utils.distributed``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .errors import CheckpointSaveError

Result = TypeVar("Result")


def is_launched() -> bool:
    """Whether torchrun, or the like, started this process."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def is_distributed_initialized() -> bool:
    """Whether there is a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def get_rank() -> int:
    """The number of this process, from 0."""
    return torch.distributed.get_rank() if is_distributed_initialized() else 0


def get_world_size() -> int:
    """The number of processes."""
    return torch.distributed.get_world_size() if is_distributed_initialized() else 1


def if_main_process() -> bool:
    """Whether this process is the first, or the only one."""
    return get_rank() == 0


def ddp_broadcast(communication_object: Any, src: int = 0) -> Any:
    """Gives what one process has to all of them.

    Args:
        communication_object: Anything that can be pickled.
        src: The rank that has it.

    Returns:
        The object of rank ``src``.
    """
    if not is_distributed_initialized():
        return communication_object
    objects = [communication_object]
    torch.distributed.broadcast_object_list(objects, src=src)
    return objects[0]


def gather(value: Any) -> list[Any]:
    """What every process has, in the order of their ranks.

    Args:
        value: Anything that can be pickled.

    Returns:
        One value for each process.
    """
    if not is_distributed_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def on_all_ranks(condition: torch.Tensor) -> bool:
    """Whether a condition holds in every process.

    Args:
        condition: A boolean tensor with one element, on the device that the
            process group communicates from.

    Returns:
        The same answer everywhere.
    """
    if not is_distributed_initialized():
        return bool(condition)
    holds = condition.to(torch.uint8).reshape(())
    torch.distributed.all_reduce(holds, torch.distributed.ReduceOp.MIN)
    return bool(holds)


def on_any_rank(condition: bool, device: str) -> bool:
    """Whether a condition holds in one of the processes.

    Args:
        condition: Whether it holds here.
        device: The device that the process group communicates from.

    Returns:
        The same answer everywhere.
    """
    if not is_distributed_initialized():
        return condition
    return not on_all_ranks(torch.tensor(not condition, device=device))


def together(action: Callable[[], Result]) -> Result:
    """Does something in every process; where one fails, all of them do.

    Args:
        action: What to do here.

    Returns:
        What it returned here.

    Raises:
        CheckpointSaveError: It failed in another process.
    """
    failed: Exception | None = None
    try:
        result = action()
    except Exception as error:  # noqa: BLE001  it is raised again below
        failed = error
    told = [text for text in gather(None if failed is None else str(failed)) if text]
    if failed is not None:
        raise failed
    if told:
        raise CheckpointSaveError(f"another process could not save: {told[0]}")
    return result
