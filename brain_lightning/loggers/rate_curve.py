"""The picture of a search for a learning rate: the loss at each rate that was tried."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from .curves import new_figure, tidy
from .whole_file import written_whole

COLOR, SUGGESTED = "#4477aa", "#ee6677"


def write_rate_curve(
    path: Path, rates: Sequence[float], losses: Sequence[float], suggestion: float | None
) -> None:
    """Draws the curve; the picture is there whole or not at all.

    Args:
        path: The PNG.
        rates: The rates, in the order in which they were tried.
        losses: The smoothed loss at each.
        suggestion: The rate to mark, if any.
    """
    figure = new_figure(6, 4)
    axes = figure.add_subplot()
    axes.plot(rates, losses, color=COLOR)
    if suggestion is not None:
        loss = losses[list(rates).index(suggestion)]
        axes.plot(suggestion, loss, "o", color=SUGGESTED, label=f"suggested: {suggestion:.3g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss, smoothed")
    axes.set_ylim(*_limits(losses))
    tidy(axes)
    with written_whole(path) as part:
        figure.savefig(part, format="png")


def _limits(losses: Sequence[float]) -> tuple[float, float]:
    """Where the loss diverges is not shown to its end: the fall before that would be flat."""
    finite = [loss for loss in losses if math.isfinite(loss)] or [0.0]
    low = min(finite)
    high = max(finite[: finite.index(low) + 1])
    margin = 0.3 * (high - low) or 1.0
    return low - margin, high + margin
