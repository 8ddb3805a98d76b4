"""Saving in the background: training waits only while tensors are copied."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from .checkpoint_hooks import state_to_save


class Snapshots:
    """Copies of states, in memory that is used again.

    Memory that is new costs as much as the copy: each of its pages is made when it
    is first written to.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)

    def take(self, obj: Any) -> Any:
        """Copies an object's state, so that training may change it.

        Args:
            obj: Anything with a ``state_dict``.

        Returns:
            The state, its tensors copied to the CPU.
        """
        return tree_map_only(Tensor, self._copy, state_to_save(obj))

    def give_back(self, state: Any) -> None:
        """Takes the memory of a copy that is not needed any more.

        Args:
            state: What ``take`` returned.
        """
        for leaf in tree_leaves(state):
            if isinstance(leaf, Tensor):
                self._free[_kind(leaf)].append(leaf)

    def _copy(self, tensor: Tensor) -> Tensor:
        free = self._free[_kind(tensor)]
        buffer = free.pop() if free else torch.empty_like(tensor, device="cpu")
        return buffer.copy_(tensor.detach())


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.shape, tensor.dtype, tensor.stride())


class BackgroundSaver:
    """Runs saves one after the other; Python ends only when the last is done."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []

    def submit(self, save: Callable[[], None]) -> None:
        """Runs a save after those before it.

        Args:
            save: Writes a checkpoint.
        """
        if self._executor is None:
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending.append(self._executor.submit(save))

    def raise_error(self) -> None:
        """Raises the error of a save that is over, if there was one."""
        over = [future for future in self._pending if future.done()]
        self._pending = [future for future in self._pending if not future.done()]
        for future in over:
            future.result()

    def wait(self) -> None:
        """Waits for every save, and raises the error of one that failed."""
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()
