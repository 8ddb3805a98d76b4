"""Saves while training continues: copies states to the host and writes them in a thread."""

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
    """Copies of states. The memory of the last copies is reused for the next ones.

    New memory costs as much time as the copy, because the operating system allocates each
    page at the first write.

    Neither the host nor training waits for copies from a GPU. A separate stream copies them
    to pinned memory. Call ``wait`` before reading the copies.
    """

    def __init__(self) -> None:
        # Buffers by shape, dtype, and whether they are pinned.
        self._free: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        self._used: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        self._streams: dict[torch.device, Any] = {}
        # Events recorded after the copies, and the clones that the copies read from.
        self._copying: list[Any] = []
        self._clones: list[Tensor] = []

    def take(self, state: Any) -> Any:
        """Copies a state, so that training may continue to change the original.

        Args:
            state: A ``state_dict``.

        Returns:
            The state with its tensors copied to the CPU. The copies are complete after
            ``wait``. Tensors that share memory also share memory in the copy.
        """
        tensors = list(tensors_in(state))
        sources = {memory_of(tensor): tensor for tensor in tensors}
        # A user may save once in inference mode and later outside of it.
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
        """Waits until the copies are complete."""
        for event in self._copying:
            event.synchronize()
        self._copying.clear()
        self._clones.clear()

    def recycle(self) -> None:
        """Keeps the memory of the last copies for the next ones, and frees unused memory."""
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
        # The next optimizer step overwrites the tensors. A clone on the device is much faster
        # than a copy to the host. If there is no memory for clones, the device (not the host)
        # waits for the copy before the next step.
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
        """Whether clones fit in addition to the peak memory of training so far."""
        module = getattr(torch, device.type)
        free, _ = module.mem_get_info(device)
        free += module.memory_reserved(device) - module.max_memory_allocated(device)
        return sum(each.nbytes for each in [*self._clones, *sources]) <= int(free)


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for buffer, source in pairs:
        buffer.copy_(source, non_blocking=buffer.is_pinned())


def run_in_background(save: Callable[[], Any]) -> Future[Any]:
    """Runs a save while training continues. Python exits only after the save has ended.

    Args:
        save: Writes a checkpoint. The previous save must have ended, because there is memory
            for one copy only.
    """
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
    pending = executor.submit(_log_failure, save)
    # The thread ends with the save.
    executor.shutdown(wait=False)
    return pending


def _log_failure(save: Callable[[], Any]) -> None:
    """Logs an error immediately, because the process may end before ``result`` is called."""
    try:
        save()
    except BaseException:
        logger.exception("Could not save a checkpoint in the background.")
        raise
