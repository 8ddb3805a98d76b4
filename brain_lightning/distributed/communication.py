"""Which of several processes this one is, and collective operations of all of them.

Where there is one process only, a collective operation just returns this process's value
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
    """Whether torchrun, or the like, started this process."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def is_distributed_initialized() -> bool:
    """Whether there is a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """The number of this process, from 0."""
    return torch.distributed.get_rank() if is_distributed_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return torch.distributed.get_world_size() if is_distributed_initialized() else 1


def if_main_process() -> bool:
    """Whether this process is the first, or the only one."""
    return rank() == 0


# The functions that only the main process calls, while it calls them.
_on_main_only: list[Callable[..., Any]] = []


def communicates() -> bool:
    """Whether there are other processes, which do not wait for the main process."""
    if not is_distributed_initialized():
        return False
    return not (_on_main_only or speechbrain.is_main_process_alone())


def ddp_barrier() -> None:
    """Waits for all processes."""
    if communicates():
        torch.distributed.barrier()


def main_process_only(function: Function) -> Function:
    """Makes a function run on the main process only; every process gets its result.

    Args:
        function: What it returns can be pickled.

    Returns:
        The function.

    Raises:
        MainProcessError: It failed on the main process, where its error is raised.
    """

    @functools.wraps(function)
    def on_main(*args: Any, **kwargs: Any) -> Any:
        result, failed = None, None
        if if_main_process():
            _on_main_only.append(function)
            try:
                result = function(*args, **kwargs)
                # Else the others would wait for what cannot be sent.
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
    """Calls a function on the main process, then another one on the others.

    Args:
        func: Called on the main process, while the others wait.
        args: Of ``func``.
        kwargs: Of ``func``.
        post_func: Called afterwards, to load what ``func`` has made.
        post_args: Of ``post_func``.
        post_kwargs: Of ``post_func``.
        run_post_on_main: Whether the main process calls ``post_func`` too.

    Returns:
        What ``func`` returned, on all processes.
    """
    result = main_process_only(func)(*(args or ()), **(kwargs or {}))
    ddp_barrier()
    if post_func is not None:
        if run_post_on_main or not if_main_process():
            post_func(*(post_args or ()), **(post_kwargs or {}))
        ddp_barrier()
    return result


def ddp_broadcast(communication_object: Any, src: int = 0) -> Any:
    """Sends an object of one process to all of them.

    Args:
        communication_object: Anything that can be pickled.
        src: The rank that has it.

    Returns:
        The object of rank ``src``.
    """
    if not communicates():
        return communication_object
    objects = [communication_object]
    torch.distributed.broadcast_object_list(objects, src=src)
    return objects[0]


def gather(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks.

    Args:
        value: Anything that can be pickled.

    Returns:
        One value for each process.
    """
    if not communicates():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def on_all_ranks(condition: bool, device: torch.device | str) -> bool:
    """Whether a condition holds in every process.

    Args:
        condition: Whether it holds here.
        device: The device that the process group communicates from.

    Returns:
        The same answer everywhere.
    """
    if not communicates():
        return condition
    holds = torch.tensor(condition, dtype=torch.uint8, device=device)
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
    return not on_all_ranks(not condition, device)


def collectively(action: Callable[[], Result]) -> Result:
    """Calls a function in every process; where one fails, all of them do.

    Args:
        action: What to call in this process.

    Returns:
        What it returned in this process.

    Raises:
        CheckpointSaveError: It failed in another process.
    """
    try:
        result = action()
    except Exception as error:
        gather(str(error))
        raise
    causes = list(filter(None, gather("")))
    if causes:
        raise CheckpointSaveError(f"another process could not save: {causes[0]}")
    return result


def by_main_process(action: Callable[[], object]) -> None:
    """Calls a function in the main process, while the others wait; where it fails, all do.

    What the main process writes for SpeechBrain's Checkpointer is written so: the next thing
    each process does there is to list the checkpoints with their files, twice. A process that
    finds another file the second time deletes a checkpoint that the others keep, and all wait
    for each other for ever.

    Args:
        action: What to call.

    Raises:
        CheckpointSaveError: It failed in the main process, which has its own error.
    """
    collectively(lambda: action() if if_main_process() else None)
