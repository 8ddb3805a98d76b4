"""The learning rate schedule."""

from __future__ import annotations


class NewBob:
    """Lowers the learning rate when a metric stops falling, as SpeechBrain's NewBobScheduler.

    Args:
        factor: Multiplier of the learning rate if the metric does not improve.
        threshold: Smallest relative improvement that counts as one.
    """

    def __init__(self, factor: float, threshold: float) -> None:
        self.factor = factor
        self.threshold = threshold
        self.previous = float("inf")

    def __call__(self, metric: float) -> float:
        """Compares the metric of this epoch with the metric of the previous epoch.

        Args:
            metric: Newest value; lower is better.

        Returns:
            Multiplier of the learning rate: ``factor`` or 1.
        """
        improved = metric < self.previous * (1 - self.threshold)
        self.previous = metric
        return 1.0 if improved else self.factor
