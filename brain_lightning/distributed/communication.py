"""The rank of this process, and collectives over all ranks.

With a single process, a collective returns the value of this process
(``speechbrain.utils.distributed``).
"""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from brain_lightning.compat import speechbrain
from brain_lightning.errors import CheckpointSaveError, MainProcessError

Result = TypeVar("Result")
Function = TypeVar("Function", bound=Callable[..., Any])


def is_launched() -> bool:
    """Returns whether torchrun or another launcher started this process."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def is_distributed_initialized() -> bool:
    """Returns whether there is a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """Returns the rank of this process."""
    return torch.distributed.get_rank() if is_distributed_initialized() else 0


def world_size() -> int:
    """Returns the number of processes."""
    return torch.distributed.get_world_size() if is_distributed_initialized() else 1


def if_main_process() -> bool:
    """Returns whether this process has rank 0 or is the only process."""
    return rank() == 0


# The functions that currently run on the main process only.
_on_main_only: list[Callable[..., Any]] = []


def communicates() -> bool:
    """Returns whether other ranks take part, as opposed to waiting for the main process."""
    if not is_distributed_initialized():
        return False
    return not (_on_main_only or speechbrain.is_main_process_alone())


def ddp_barrier() -> None:
    """Waits until all processes reach this barrier."""
    if communicates():
        torch.distributed.barrier()


def main_process_only(function: Function) -> Function:
    """Makes a function run on the main process only. All processes get its return value.

    Args:
        function: Function whose return value can be pickled.

    Returns:
        The wrapped function.

    Raises:
        MainProcessError: The function failed on the main process, which raises the original
            error.
    """

    @functools.wraps(function)
    def on_main(*args: Any, **kwargs: Any) -> Any:
        result, failed = None, None
        if if_main_process():
            _on_main_only.append(function)
            try:
                result = function(*args, **kwargs)
                # If the result cannot be pickled, raise here. The other ranks would hang.
                pickle.dumps(result)
            except BaseException as error:  # noqa: BLE001  it is raised again below
                result, failed = None, error
            finally:
                _on_main_only.pop()
        result, cause = ddp_broadcast((result, None if failed is None else repr(failed)))
        if failed is not None:
            raise failed
        if cause is not None:
            raise MainProcessError(f"{function.__name__} failed on the main process: {cause}")
        return result

    return on_main  # type: ignore[return-value]


def run_on_main(
    func: Callable[..., Any],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    post_func: Callable[..., Any] | None = None,
    post_args: Sequence[Any] | None = None,
    post_kwargs: Mapping[str, Any] | None = None,
    run_post_on_main: bool = False,
) -> Any:
    """Calls a function on the main process, and then another function on the other processes.

    Args:
        func: Function that the main process calls, while the other processes wait.
        args: Positional arguments of ``func``.
        kwargs: Keyword arguments of ``func``.
        post_func: Function that is called afterwards, for example to load the files that
            ``func`` wrote.
        post_args: Positional arguments of ``post_func``.
        post_kwargs: Keyword arguments of ``post_func``.
        run_post_on_main: Whether the main process also calls ``post_func``.

    Returns:
        The return value of ``func``, on all processes.
    """
    result = main_process_only(func)(*(args or ()), **(kwargs or {}))
    ddp_barrier()
    if post_func is not None:
        if run_post_on_main or not if_main_process():
            post_func(*(post_args or ()), **(post_kwargs or {}))
        ddp_barrier()
    return result


def ddp_broadcast(communication_object: Any, src: int = 0) -> Any:
    """Broadcasts an object from one rank to all ranks.

    Args:
        communication_object: Any object that can be pickled.
        src: Rank that sends its object.

    Returns:
        The object of rank ``src``.
    """
    if not communicates():
        return communication_object
    objects = [communication_object]
    torch.distributed.broadcast_object_list(objects, src=src)
    return objects[0]


def gather(value: Any) -> list[Any]:
    """Gathers a value from all ranks, in the order of the ranks.

    Args:
        value: Any object that can be pickled.

    Returns:
        One value per rank.
    """
    if not communicates():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def on_all_ranks(condition: bool, device: torch.device | str) -> bool:
    """Returns whether a condition is true on all ranks.

    Args:
        condition: The condition on this rank.
        device: Device that the process group communicates from.

    Returns:
        The same result on all ranks.
    """
    if not communicates():
        return condition
    holds = torch.tensor(condition, dtype=torch.uint8, device=device)
    torch.distributed.all_reduce(holds, torch.distributed.ReduceOp.MIN)
    return bool(holds)


def on_any_rank(condition: bool, device: str) -> bool:
    """Returns whether a condition is true on any rank.

    Args:
        condition: The condition on this rank.
        device: Device that the process group communicates from.

    Returns:
        The same result on all ranks.
    """
    return not on_all_ranks(not condition, device)


def collectively(action: Callable[[], Result]) -> Result:
    """Calls a function on every rank. If it fails on one rank, all ranks raise an error.

    Args:
        action: Function to call on this rank.

    Returns:
        Its return value on this rank.

    Raises:
        CheckpointSaveError: The function failed on another rank.
    """
    try:
        result = action()
    except Exception as error:
        gather(str(error))
        raise
    causes = list(filter(None, gather("")))
    if causes:
        raise CheckpointSaveError(f"another rank could not save: {causes[0]}")
    return result


def by_main_process(action: Callable[[], object]) -> None:
    """Calls a function on the main process only. If it fails, all ranks raise an error.

    All ranks wait until it returns. This matters for files of SpeechBrain's Checkpointer:
    afterwards each rank lists the checkpoints and their files twice. If a rank found another
    file the second time, it would delete a checkpoint that the other ranks keep, and all
    ranks would hang.

    Args:
        action: Function to call.

    Raises:
        CheckpointSaveError: The function failed on the main process, which raises the
            original error.
    """
    collectively(lambda: action() if if_main_process() else None)
