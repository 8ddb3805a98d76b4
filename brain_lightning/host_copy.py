"""A number of a device on its way to the host, which does something else meanwhile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
