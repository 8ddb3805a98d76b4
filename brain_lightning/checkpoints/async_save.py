"""Saving in the background: training waits only while tensors are copied to memory."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Snapshots:
    """Copies of states, whose memory is used again for the next copies.

    New memory costs as much as the copy: each of its pages is made when it is first
    written to.
    """

    def __init__(self) -> None:
        # By shape and type.
        self._free: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        self._used: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)

    def take(self, state: Any) -> Any:
        """Copies a state, so that training may change the object that it is of.

        Args:
            state: A ``state_dict``.

        Returns:
            The state, its tensors copied to the CPU; those that share memory share it
            in the copy.
        """
        copies: dict[tuple[Any, ...], Tensor] = {}
        memo: dict[int, Tensor] = {}
        for tensor in _tensors_in(state):
            memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if memory not in copies:
                copies[memory] = self._copy(tensor)
            memo[id(tensor)] = copies[memory]
        return copy.deepcopy(state, memo)

    def recycle(self) -> None:
        """Keeps the memory of the last copies for the next ones, and frees that of earlier."""
        self._free, self._used = self._used, defaultdict(list)

    def _copy(self, tensor: Tensor) -> Tensor:
        kind = (tensor.shape, tensor.dtype)
        free = self._free[kind]
        # A user may save in inference mode, and later out of it.
        with torch.inference_mode(False), torch.no_grad():
            buffer = free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype)
            buffer.copy_(tensor)
        self._used[kind].append(buffer)
        return buffer


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.layout == torch.strided:
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(each)


def run_in_background(save: Callable[[], Any]) -> Future[Any]:
    """Runs a save while training continues; Python exits only when it is done.

    Args:
        save: Writes a checkpoint. There is memory for one copy only: the save before must
            have ended.
    """
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
    pending = executor.submit(_log_failure, save)
    # Its thread ends with the save.
    executor.shutdown(wait=False)
    return pending


def _log_failure(save: Callable[[], Any]) -> None:
    """Logs an error at once: the process may end before anybody waits for the save."""
    try:
        save()
    except BaseException:
        logger.exception("A checkpoint could not be saved in the background.")
        raise
