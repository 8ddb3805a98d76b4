"""Draws the plot of a learning rate search: the loss at each rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from .atomic_file import atomically_replaced
from .curves import new_figure, tidy

COLOR, SUGGESTED = "#4477aa", "#ee6677"


def write_rate_curve(
    path: Path, rates: Sequence[float], losses: Sequence[float], suggestion: float | None
) -> None:
    """Writes the plot. The file is replaced atomically.

    Args:
        path: Path of the PNG file.
        rates: Learning rates in the order in which they were tried.
        losses: Smoothed loss at each rate.
        suggestion: Rate to mark, or None.
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
    with atomically_replaced(path) as part:
        figure.savefig(part, format="png")


def _limits(losses: Sequence[float]) -> tuple[float, float]:
    """Returns limits of the y axis that hide divergence, which would flatten the curve."""
    finite = [loss for loss in losses if math.isfinite(loss)] or [0.0]
    low = min(finite)
    high = max(finite[: finite.index(low) + 1])
    margin = 0.3 * (high - low) or 1.0
    return low - margin, high + margin
