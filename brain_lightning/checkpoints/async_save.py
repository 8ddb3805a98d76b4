"""Saving while training continues: copies of states, and a thread that writes them."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from brain_lightning.host_copy import (
    by_device,
    current_stream,
    has_streams,
    memory_of,
    tensors_in,
)

logger = logging.getLogger(__name__)


class StateCopies:
    """Copies of states, whose memory is used again for the next copies.

    New memory costs as much as the copy: each of its pages is made when it is first
    written to.

    Neither the host nor training waits for copies from a GPU: a stream of their own brings
    them to pinned memory, and whoever reads them calls ``wait`` first.
    """

    def __init__(self) -> None:
        # By shape, type, and whether it is pinned.
        self._free: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        self._used: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        self._streams: dict[torch.device, Any] = {}
        # Events that are recorded behind copies, and clones that are copied until then.
        self._copying: list[Any] = []
        self._clones: list[Tensor] = []

    def take(self, state: Any) -> Any:
        """Copies a state, so that training may change the object that it is of.

        Args:
            state: A ``state_dict``.

        Returns:
            The state, its tensors copied to the CPU, where they are after ``wait``; those
            that share memory share it in the copy.
        """
        tensors = list(tensors_in(state))
        sources = {memory_of(tensor): tensor for tensor in tensors}
        # A user may save in inference mode, and later out of it.
        with torch.inference_mode(False), torch.no_grad():
            copies = {memory: self._buffer(source) for memory, source in sources.items()}
            for device, here in by_device(sources).items():
                pairs = [(copies[memory], sources[memory]) for memory in here]
                if has_streams(device):
                    self._copy_beside_training(device, pairs)
                else:
                    _copy(pairs)
        return copy.deepcopy(state, {id(each): copies[memory_of(each)] for each in tensors})

    def wait(self) -> None:
        """Waits until the copies are there."""
        for event in self._copying:
            event.synchronize()
        self._copying.clear()
        self._clones.clear()

    def recycle(self) -> None:
        """Keeps the memory of the last copies for the next ones, and frees that of earlier."""
        self._free, self._used = self._used, defaultdict(list)

    def _buffer(self, tensor: Tensor) -> Tensor:
        pinned = has_streams(tensor.device)
        kind = (tensor.shape, tensor.dtype, pinned)
        free = self._free[kind]
        if free:
            buffer = free.pop()
        else:
            buffer = torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned
            )
        self._used[kind].append(buffer)
        return buffer

    def _copy_beside_training(
        self, device: torch.device, pairs: list[tuple[Tensor, Tensor]]
    ) -> None:
        module = getattr(torch, device.type)
        training = current_stream(device)
        beside = self._streams.setdefault(device, module.Stream(device))
        # Training overwrites its tensors in the next step. A clone is made at the speed of the
        # device's memory, by far faster than the copy to the host; where there is no room for
        # one, the device waits for the copy before it takes that step, and the host does not.
        has_room = self._has_room(device, [source for _, source in pairs])
        if has_room:
            pairs = [(buffer, source.clone()) for buffer, source in pairs]
            self._clones += [clone for _, clone in pairs]
        beside.wait_stream(training)
        with module.stream(beside):
            _copy(pairs)
        copied = beside.record_event()
        self._copying.append(copied)
        if not has_room:
            training.wait_event(copied)

    def _has_room(self, device: torch.device, sources: list[Tensor]) -> bool:
        """Whether clones fit beside the most that training has needed so far."""
        module = getattr(torch, device.type)
        free, _ = module.mem_get_info(device)
        free += module.memory_reserved(device) - module.max_memory_allocated(device)
        return sum(each.nbytes for each in [*self._clones, *sources]) <= int(free)


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for buffer, source in pairs:
        buffer.copy_(source, non_blocking=buffer.is_pinned())


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
