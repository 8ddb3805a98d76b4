"""Numbers of a device on their way to the host, which does something else meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Copies tensors to the host, behind what their device has in its queue.

    Until ``wait`` the copies hold anything. Where the tensors are on the CPU they are the
    copies themselves, and of a device without streams they are there at once.

    Args:
        *tensors: All of one device.
    """

    def __init__(self, *tensors: Tensor) -> None:
        device = tensors[0].device
        is_queued = has_streams(device)
        # torch takes memory that a device can write to by itself (pinned memory).
        self._copies = [each.detach().to("cpu", non_blocking=is_queued) for each in tensors]
        self._event = current_stream(device).record_event() if is_queued else None

    def has_arrived(self) -> bool:
        """Whether ``wait`` returns at once."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> Sequence[Tensor]:
        """Waits until the copies are there, and not for what was queued after them.

        Returns:
            The copies, on the CPU.
        """
        if self._event is not None and not self.has_arrived():
            self._event.synchronize()
        return self._copies
