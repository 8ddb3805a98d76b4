"""Tensors of a device on their way to the host, which may do something else meanwhile."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

# Where a tensor is in memory, and how.
Memory = tuple[Any, ...]
State = TypeVar("State")


def has_streams(device: torch.device) -> bool:
    """Whether a device copies while it computes; CUDA and XPU do, MPS does not.

    Args:
        device: Any device.
    """
    module = getattr(torch, device.type, None)
    return hasattr(module, "Stream") and hasattr(module, "mem_get_info")


def current_stream(device: torch.device) -> Any:
    """The stream in which work for a device is queued (``torch.cuda.current_stream``).

    Args:
        device: One that ``has_streams``.
    """
    # torch.accelerator.current_stream came with torch 2.6.
    return getattr(torch, device.type).current_stream(device)


class HostCopy:
    """Copies a tensor to the host, behind what its device has in its queue.

    Args:
        tensor: The tensor. One of the CPU is its own copy; that of a device without streams
            is there at once.
    """

    def __init__(self, tensor: Tensor) -> None:
        is_queued = has_streams(tensor.device)
        # torch takes memory that a device can write to by itself (pinned memory); what it
        # holds before ``wait`` is not defined.
        self._copy = tensor.detach().to("cpu", non_blocking=is_queued)
        self._event = current_stream(tensor.device).record_event() if is_queued else None

    def has_arrived(self) -> bool:
        """Whether ``wait`` returns at once."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> Tensor:
        """Waits until the copy is there, and not for what was queued after it.

        Returns:
            The copy, on the CPU.
        """
        if self._event is not None and not self.has_arrived():
            self._event.synchronize()
        return self._copy


def on_host(state: State) -> State:
    """A state with its tensors on the CPU, for which the host waits once, not once for each.

    Args:
        state: Tensors and plain values.

    Returns:
        The state itself where it is there already; else a copy, in which tensors that share
        memory share it too.
    """
    tensors = list(tensors_in(state))
    # torch has its own ways with other kinds of tensors.
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
    """Where a tensor is in memory, and how: tensors with the same share it.

    Args:
        tensor: The tensor.
    """
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def by_device(sources: Iterable[Memory]) -> dict[torch.device, list[Memory]]:
    """Places in memory by their device.

    Args:
        sources: From ``memory_of``.
    """
    found: dict[torch.device, list[Memory]] = defaultdict(list)
    for memory in sources:
        found[memory[0]].append(memory)
    return found


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The strided tensors of a state.

    Args:
        value: Tensors and plain values, in mappings and sequences.
    """
    if isinstance(value, Tensor) and value.layout == torch.strided:
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(each)
