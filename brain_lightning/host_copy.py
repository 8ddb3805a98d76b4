"""A number of a device on its way to the host, which does something else meanwhile."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """Copies a tensor to the host, behind what its device has in its queue.

    Args:
        tensor: The tensor; one of the CPU is its own copy.
    """

    def __init__(self, tensor: Tensor) -> None:
        # torch takes memory that a device can write to by itself (pinned memory); what it
        # holds before ``wait`` is not defined.
        self._copy = tensor.detach().to("cpu", non_blocking=True)
        self._event: torch.Event | None = None
        if not tensor.is_cpu:
            self._event = torch.Event(tensor.device)
            self._event.record()

    def has_arrived(self) -> bool:
        """Whether ``wait`` returns at once."""
        return self._event is None or self._event.query()

    def wait(self) -> Tensor:
        """Waits until the copy is there, and not for what was queued after it.

        Returns:
            The copy, on the CPU.
        """
        if self._event is not None and not self.has_arrived():
            self._event.synchronize()
        return self._copy
