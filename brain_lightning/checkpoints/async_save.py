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

from .state_files import state_to_save

logger = logging.getLogger(__name__)


class Snapshots:
    """Copies of states, whose memory is used again for the next copies.

    New memory costs as much as the copy: each of its pages is made when it is first
    written to.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        self._used: list[Tensor] = []

    def take(self, obj: Any) -> Any:
        """Copies an object's state, so that training may change it.

        Args:
            obj: Anything with a ``state_dict``.

        Returns:
            The state, its tensors copied to the CPU; those that share memory share it
            in the copy.
        """
        state = state_to_save(obj)
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
        self._free = defaultdict(list)
        for buffer in self._used:
            self._free[_kind(buffer)].append(buffer)
        self._used = []

    def _copy(self, tensor: Tensor) -> Tensor:
        free = self._free[_kind(tensor)]
        # A user may save in inference mode, and later out of it.
        with torch.inference_mode(False), torch.no_grad():
            buffer = free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype)
            buffer.copy_(tensor)
        self._used.append(buffer)
        return buffer


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.shape, tensor.dtype)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.layout == torch.strided:
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors_in(each)


class BackgroundSaver:
    """Runs a save while training continues; Python exits only when it is done."""

    def __init__(self) -> None:
        self._pending: Future[Any] | None = None

    def submit(self, save: Callable[[], Any]) -> None:
        """Runs a save; call ``wait`` before, for there is memory for one copy only.

        Args:
            save: Writes a checkpoint.
        """
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending = executor.submit(_log_failure, save)
        # Its thread ends with the save.
        executor.shutdown(wait=False)

    def wait(self) -> None:
        """Waits for the save, and raises its error if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _log_failure(save: Callable[[], Any]) -> None:
    """Logs an error at once: the process may end before anybody waits for the save."""
    try:
        save()
    except BaseException:
        logger.exception("A checkpoint could not be saved in the background.")
        raise
