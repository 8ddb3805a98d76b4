"""The average loss of an evaluation, into which losses are folded when they have arrived."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor

from brain_lightning.host_copy import HostCopy
from brain_lightning.protocol import BrainProtocol
from brain_lightning.temporary import TemporaryAttributes


class RunningAverage:
    """``update_average`` of a Brain, for losses that may still be on their way to the host.

    Args:
        brain: The Brain that evaluates.
    """

    def __init__(self, brain: BrainProtocol) -> None:
        self._brain = brain
        self._value = 0.0
        # With the step that each belongs to.
        self._arriving: deque[tuple[int, HostCopy]] = deque()

    def restart(self, value: float) -> None:
        """Begins anew.

        Args:
            value: The average.
        """
        self._arriving.clear()
        self._value = value

    def update(self, loss: Any) -> None:
        """Adds the loss of the batch that the Brain's ``step`` counts.

        Args:
            loss: The detached loss; the host does not wait for one of another device.
        """
        if not isinstance(loss, Tensor) or loss.is_cpu:
            self._value = self._brain.update_average(loss, self.value())
            return
        self._arriving.append((self._brain.step, HostCopy(loss)))
        while self._arriving and self._arriving[0][1].has_arrived():
            self._fold()

    def value(self) -> float:
        """The average of all losses so far, for which the host waits."""
        while self._arriving:
            self._fold()
        return self._value

    def _fold(self) -> None:
        step, copy = self._arriving.popleft()
        with TemporaryAttributes() as temporary:
            temporary.set(self._brain, "step", step)
            self._value = self._brain.update_average(copy.wait(), self._value)
