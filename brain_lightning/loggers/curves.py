"""Draws the plot of a training: one panel for the losses, and one for each other metric."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import cycle
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from brain_lightning.stage import Stage
from brain_lightning.stages.metrics import staged

from .atomic_file import atomically_replaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers = Mapping[str, float]
History = dict[float, dict[str, float]]

# Key of the metrics in the metadata of the PNG file. They are stored nowhere else.
KEY = "brain_lightning"
COLORS = {Stage.TRAIN: "#4477aa", Stage.VALID: "#ee6677", Stage.TEST: "#228833"}
NO_STAGE = "#555555"
RATES = ("#555555", "#aa3377", "#66ccee", "#ccbb44")
# Names of counters, which are not plotted (see train_logger.py).
COUNTERS = {"epoch", "step", "steps", "epoch loaded"}
COLUMNS = 3
# If the values of a panel differ by more than this factor, its scale is logarithmic.
SPAN = 20


def write_curves(path: Path, history: History, tests: Sequence[Numbers]) -> None:
    """Writes the plot. The file is replaced atomically.

    Args:
        path: Path of the PNG file.
        history: Metrics by epoch, such as ``train_loss``, ``valid_WER`` or ``lr``.
        tests: Metrics of each test, such as ``test_WER``.
    """
    text = json.dumps(list(history.items()))
    with atomically_replaced(path) as part:
        draw(history, tests).savefig(part, format="png", metadata={KEY: text})


def read_curves(path: Path) -> History:
    """Reads the metrics that are stored in a plot.

    Args:
        path: PNG file that ``write_curves`` wrote.

    Returns:
        Metrics by epoch. Empty if there is no such file.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return dict(json.loads(image.info[KEY]))
    except (OSError, KeyError, TypeError, ValueError):
        return {}


def draw(history: History, tests: Sequence[Numbers]) -> Figure:
    """Draws the plot.

    Args:
        history: See ``write_curves``.
        tests: See ``write_curves``.

    Returns:
        The figure, which is not registered with pyplot.
    """
    names, rates = _panels([*history.values(), *tests])
    panels = len(names) + bool(rates)
    columns = max(1, min(COLUMNS, panels))
    rows = max(1, ceil(panels / columns))
    figure = new_figure(4.5 * columns, 3.4 * rows)
    for index, name in enumerate(names):
        _draw_panel(figure.add_subplot(rows, columns, index + 1), name, history, tests)
    if rates:
        _draw_rates(figure.add_subplot(rows, columns, panels), rates, history)
    return figure


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure, which does not need a display.

    Args:
        width: Width in inches.
        height: Height in inches.
    """
    from matplotlib.figure import Figure

    # A figure that is created without pyplot uses the Agg backend.
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def tidy(axes: Axes) -> None:
    """Adds a grid to a panel, and a legend if its curves have labels.

    Args:
        axes: The panel, with its curves.
    """
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)


def is_rate(name: str) -> bool:
    """Returns whether a metric is a learning rate, such as ``lr``, ``lr_g`` or ``old_lr``.

    Args:
        name: Name of the metric.
    """
    return "lr" in name.lower().split("_")


def _panels(entries: Sequence[Numbers]) -> tuple[list[str], list[str]]:
    """Returns names of metrics without their stage, the loss first, and of learning rates."""
    names = dict.fromkeys(_without_stage(name) for numbers in entries for name in numbers)
    shown = [name for name in names if name.lower() not in COUNTERS]
    shown.sort(key=lambda name: name != "loss")
    return [n for n in shown if not is_rate(n)], [n for n in shown if is_rate(n)]


def _without_stage(name: str) -> str:
    return next((name[len(p) :] for s in Stage if name.startswith(p := staged(s, ""))), name)


def _draw_panel(axes: Axes, name: str, history: History, tests: Sequence[Numbers]) -> None:
    drawn = [
        _curve(axes, history, staged(stage, name), stage.name.lower(), COLORS[stage])
        for stage in Stage
    ]
    if not any(drawn):
        # Metrics with a stage are also stored without it, and are drawn once (see metrics.py).
        _curve(axes, history, name, "", NO_STAGE)
    for numbers in tests:
        if (value := numbers.get(staged(Stage.TEST, name))) is not None:
            axes.axhline(value, ls="--", color=COLORS[Stage.TEST], label=f"test: {value:.4g}")
    _finish(axes, name)


def _draw_rates(axes: Axes, names: Sequence[str], history: History) -> None:
    for name, color in zip(names, cycle(RATES), strict=False):
        _curve(axes, history, name, name if len(names) > 1 else "", color)
    _finish(axes, "learning rate")


def _curve(axes: Axes, history: History, name: str, label: str, color: str) -> bool:
    """Plots one metric. Returns False if no epoch has it."""
    points = [(epoch, numbers[name]) for epoch, numbers in history.items() if name in numbers]
    if points:
        # Markers that overlap would make the line thick.
        style = "o-" if len(points) <= 40 else "-"
        axes.plot(*zip(*points, strict=True), style, ms=4, color=color, label=label or None)
    return bool(points)


def _finish(axes: Axes, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    low, high = axes.dataLim.intervaly
    if 0 < SPAN * low < high:
        axes.set_yscale("log")
    axes.set(title=name, xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes)
