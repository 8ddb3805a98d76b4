"""When to slow down."""

from __future__ import annotations


class NewBob:
    """Lowers the learning rate when a metric stops falling, as SpeechBrain's NewBobScheduler.

    Args:
        factor: What to multiply the learning rate by.
        threshold: The relative improvement below which the metric has stopped.
    """

    def __init__(self, factor: float, threshold: float) -> None:
        self.factor = factor
        self.threshold = threshold
        self.previous = float("inf")

    def __call__(self, metric: float) -> float:
        """Compares the metric of this epoch with that of the epoch before.

        Args:
            metric: The newest value; less is better.

        Returns:
            What to multiply the learning rate by: the factor, or 1.
        """
        improved = metric < self.previous * (1 - self.threshold)
        self.previous = metric
        return 1.0 if improved else self.factor
