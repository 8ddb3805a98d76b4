"""Copies tensors from a device to the host without blocking the host."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

# Location and layout of a tensor in memory.
Memory = tuple[Any, ...]
State = TypeVar("State")


def has_streams(device: torch.device) -> bool:
    """Returns whether a device copies while it computes. CUDA and XPU do, MPS does not.

    Args:
        device: Any device.
    """
    module = getattr(torch, device.type, None)
    return hasattr(module, "Stream") and hasattr(module, "mem_get_info")


def current_stream(device: torch.device) -> Any:
    """Returns the stream that queues the work of a device (``torch.cuda.current_stream``).

    Args:
        device: A device for which ``has_streams`` is true.
    """
    # torch.accelerator.current_stream needs torch 2.6.
    return getattr(torch, device.type).current_stream(device)


class HostCopy:
    """Copies a tensor to the host. The copy is queued after the work in the device's queue.

    Args:
        tensor: The tensor. A tensor on the CPU is not copied. On a device without streams,
            the copy is complete at once.
    """

    def __init__(self, tensor: Tensor) -> None:
        is_queued = has_streams(tensor.device)
        # torch allocates pinned memory, which a device writes to by itself. Its content is
        # undefined before ``wait`` returns.
        self._copy = tensor.detach().to("cpu", non_blocking=is_queued)
        self._event = current_stream(tensor.device).record_event() if is_queued else None

    def has_arrived(self) -> bool:
        """Returns whether the copy is complete, so that ``wait`` returns at once."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> Tensor:
        """Waits until the copy is complete, but not for work that was queued after it.

        Returns:
            The copy, on the CPU.
        """
        if self._event is not None and not self.has_arrived():
            self._event.synchronize()
        return self._copy


def on_host(state: State) -> State:
    """Moves the tensors of a state to the CPU. The host waits once, not once per tensor.

    Args:
        state: Tensors and plain values.

    Returns:
        The state itself if all tensors are on the CPU. Otherwise a copy, in which tensors
        that shared memory still share it.
    """
    tensors = list(tensors_in(state))
    # Subclasses of Tensor have their own implementations of ``to``.
    away = [t for t in tensors if type(t) is Tensor and t.device.type not in ("cpu", "meta")]
    if not away:
        return state
    sources = {memory_of(tensor): tensor for tensor in away}
    copies = {
        memory: each.to("cpu", non_blocking=has_streams(each.device))
        for memory, each in sources.items()
    }
    for device in filter(has_streams, by_device(sources)):
        current_stream(device).synchronize()
    memo = {id(tensor): tensor for tensor in tensors}
    memo |= {id(tensor): copies[memory_of(tensor)] for tensor in away}
    return copy.deepcopy(state, memo)


def memory_of(tensor: Tensor) -> Memory:
    """Returns the location and layout of a tensor. Tensors with an equal result share memory.

    Args:
        tensor: The tensor.
    """
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def by_device(sources: Iterable[Memory]) -> dict[torch.device, list[Memory]]:
    """Groups memory locations by device.

    Args:
        sources: Results of ``memory_of``.
    """
    found: dict[torch.device, list[Memory]] = defaultdict(list)
    for memory in sources:
        found[memory[0]].append(memory)
    return found


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields the strided tensors of a state.

    Args:
        value: Tensors and plain values, in mappings and sequences.
    """
    if isinstance(value, Tensor) and value.layout == torch.strided:
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(each)
