"""Saving in the background: training waits only while tensors are copied."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .hooks import state_to_save

logger = logging.getLogger(__name__)


class Snapshots:
    """Copies of states, in memory that is used again.

    Memory that is new costs as much as the copy: each of its pages is made when it
    is first written to.
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
            where = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if where not in copies:
                copies[where] = self._copy(tensor)
            memo[id(tensor)] = copies[where]
        return copy.deepcopy(state, memo)

    def give_back(self) -> None:
        """Takes the memory of the last copies, and lets that of earlier ones go."""
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
    """Runs a save while training goes on; Python ends only when it is done."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._pending: Future[Any] | None = None

    def submit(self, save: Callable[[], Any]) -> None:
        """Runs a save; call ``wait`` before, for there is memory for one copy only.

        Args:
            save: Writes a checkpoint.
        """
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending = self._executor.submit(_told, save)
        # Its thread ends with the save; nobody need come back for it.
        self._executor.shutdown(wait=False)

    def wait(self) -> None:
        """Waits for the save, and raises its error if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _told(save: Callable[[], Any]) -> None:
    """An error is logged at once: the process may end before anybody waits."""
    try:
        save()
    except BaseException:
        logger.exception("A checkpoint could not be saved in the background.")
        raise
