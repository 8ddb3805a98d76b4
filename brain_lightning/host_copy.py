"""Numbers of a device on their way to the host, which does something else meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class HostCopy:
    """Copies tensors to the host, behind what their device has in its queue.

    Until ``wait`` the copies hold anything. Where the tensors are on the CPU they are the
    copies themselves.

    Args:
        *tensors: All of one device.
    """

    def __init__(self, *tensors: Tensor) -> None:
        # torch takes memory that a device can write to by itself (pinned memory).
        self._copies = [each.detach().to("cpu", non_blocking=True) for each in tensors]
        self._event: torch.Event | None = None
        if any(not each.is_cpu for each in tensors):
            self._event = torch.Event(tensors[0].device)
            self._event.record()

    def has_arrived(self) -> bool:
        """Whether ``wait`` returns at once."""
        return self._event is None or self._event.query()

    def wait(self) -> Sequence[Tensor]:
        """Waits until the copies are there, and not for what was queued after them.

        Returns:
            The copies, on the CPU.
        """
        if self._event is not None and not self.has_arrived():
            self._event.synchronize()
        return self._copies
