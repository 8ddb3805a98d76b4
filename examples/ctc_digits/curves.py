"""Draws the losses and error rates of a run."""

from __future__ import annotations

from collections.abc import Sequence
from math import isclose
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

TRAIN, VALID, TEST = "#4477aa", "#ee6677", "#228833"


class Epoch(NamedTuple):
    """Results of one epoch."""

    number: int
    learning_rate: float
    train_loss: float
    valid_loss: float
    error_rate: float


def draw_curves(
    history: Sequence[Epoch], test_loss: float, test_error_rate: float, path: str | Path
) -> None:
    """Draws the losses beside the error rates.

    Args:
        history: Results of all epochs.
        test_loss: Average loss on the test lines.
        test_error_rate: Digit error rate on the test lines, from 0 to 1.
        path: Path of the PNG file; its folder is created.
    """
    # A Figure without pyplot draws with Agg. It needs no display and leaves no global state.
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers = [epoch.number for epoch in history]
    left.plot(numbers, [e.train_loss for e in history], "o-", color=TRAIN, label="train")
    left.plot(numbers, [e.valid_loss for e in history], "o-", color=VALID, label="valid")
    left.axhline(test_loss, ls="--", color=TEST, label=f"test, at the end: {test_loss:.3f}")
    _finish(left, "CTC loss per digit", "loss")
    percents = [100 * epoch.error_rate for epoch in history]
    percent = 100 * test_error_rate
    right.plot(numbers, percents, "o-", color=VALID, label="valid")
    right.axhline(percent, ls="--", color=TEST, label=f"test, at the end: {percent:.2f}%")
    _finish(right, "Digit error rate", "error rate", unit="%")
    figure.suptitle("Lines of handwritten digits, read column by column")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _finish(axes: Axes, title: str, quantity: str, unit: str = "") -> None:
    low, high = axes.dataLim.intervaly
    if isclose(low, high):
        # A log scale needs a range, and all values are equal (for example 100 %).
        axes.set_ylim(low / 2, high * 2)
    axes.set(title=title, xlabel="epoch", ylabel=quantity, yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{unit}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
