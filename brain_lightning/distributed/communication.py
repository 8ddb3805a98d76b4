"""Several processes that train one Brain: who this one is, and what all of them agree on.

Each function has no effect where there is one process only
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


class _MainProcess:
    """How many functions that the main process does alone are on their way."""

    alone = 0


def communicates() -> bool:
    """Whether there are others, and they are not waiting for the main process."""
    alone = _MainProcess.alone or speechbrain.is_main_process_alone()
    return is_distributed_initialized() and not alone


def ddp_barrier() -> None:
    """Waits for all processes."""
    if communicates():
        torch.distributed.barrier()


def main_process_only(function: Function) -> Function:
    """Lets only the main process call a function; all get what it returned.

    Args:
        function: What it returns can be pickled.

    Returns:
        The function.

    Raises:
        MainProcessError: It failed on the main process; there its own error is raised.
    """

    @functools.wraps(function)
    def on_main(*args: Any, **kwargs: Any) -> Any:
        result, failed = None, None
        if if_main_process():
            _MainProcess.alone += 1
            try:
                result = function(*args, **kwargs)
                # Else the others would wait for what cannot be sent.
                pickle.dumps(result)
            except BaseException as error:  # noqa: BLE001  it is raised again below
                result, failed = None, error
            finally:
                _MainProcess.alone -= 1
        result, told = ddp_broadcast((result, None if failed is None else repr(failed)))
        if failed is not None:
            raise failed
        if told is not None:
            raise MainProcessError(f"{function.__name__} failed on the main process: {told}")
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
    """Gives what one process has to all of them.

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
    """What every process has, in the order of their ranks.

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


def on_all_ranks(condition: torch.Tensor) -> bool:
    """Whether a condition holds in every process.

    Args:
        condition: A boolean tensor with one element, on the device that the
            process group communicates from.

    Returns:
        The same answer everywhere.
    """
    if not communicates():
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
    if not communicates():
        return condition
    return not on_all_ranks(torch.tensor(not condition, device=device))


def collectively(action: Callable[[], Result]) -> Result:
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
