"""The average loss of an evaluation. Losses are added when their copies reach the host."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor

from brain_lightning.host_copy import HostCopy
from brain_lightning.protocol import BrainProtocol


class RunningAverage:
    """Calls ``update_average`` of a Brain when losses have arrived on the host.

    Args:
        brain: The Brain that evaluates.
    """

    def __init__(self, brain: BrainProtocol) -> None:
        self._brain = brain
        self._value = 0.0
        # Copies on their way to the host, each with the step of its batch.
        self._arriving: deque[tuple[int, HostCopy]] = deque()

    def restart(self, value: float) -> None:
        """Discards the losses that have not arrived, and sets the average.

        Args:
            value: New average.
        """
        self._arriving.clear()
        self._value = value

    def update(self, loss: Any) -> None:
        """Adds the loss of the current batch, which the Brain's ``step`` counts.

        Args:
            loss: Detached loss. If it is on a GPU, the host does not wait for it.
        """
        if not isinstance(loss, Tensor) or loss.is_cpu:
            self._value = self._brain.update_average(loss, self.value())
            return
        self._arriving.append((self._brain.step, HostCopy(loss)))
        while self._arriving and self._arriving[0][1].has_arrived():
            self._add_oldest()

    def value(self) -> float:
        """Waits for all losses so far, and returns their average."""
        while self._arriving:
            self._add_oldest()
        return self._value

    def _add_oldest(self) -> None:
        brain = self._brain
        step, copy = self._arriving.popleft()
        # update_average divides by brain.step, which may be ahead of the arriving loss.
        current, brain.step = brain.step, step
        try:
            self._value = brain.update_average(copy.wait(), self._value)
        finally:
            brain.step = current
