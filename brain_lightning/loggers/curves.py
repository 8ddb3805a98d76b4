"""Curves of a training: a panel for the losses, one for each other number."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import cycle
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from brain_lightning.stage import Stage
from brain_lightning.stages.metrics import staged

from .whole_file import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers = Mapping[str, float]
History = dict[float, dict[str, float]]

# Of the numbers in the metadata of the PNG: the picture is their only file.
KEY = "brain_lightning"
COLORS = {Stage.TRAIN: "#4477aa", Stage.VALID: "#ee6677", Stage.TEST: "#228833"}
NO_STAGE = "#555555"
RATES = ("#555555", "#aa3377", "#66ccee", "#ccbb44")
# The numbers at which entries are logged: see train_logger.py.
COUNTERS = {"epoch", "step", "steps", "epoch loaded"}
COLUMNS = 3
# A scale is logarithmic where numbers differ by more than this factor.
SPAN = 20


def write_curves(path: Path, history: History, tests: Sequence[Numbers]) -> None:
    """Replaces the picture, whole or not at all.

    Args:
        path: The PNG.
        history: The numbers of each epoch, ``train_loss``, ``valid_WER`` or ``lr``.
        tests: Those of each test, ``test_WER``.
    """
    text = json.dumps(list(history.items()))
    with written_whole(path) as part:
        draw(history, tests).savefig(part, format="png", metadata={KEY: text})


def read_curves(path: Path) -> History:
    """The numbers that a picture shows.

    Args:
        path: What ``write_curves`` wrote.

    Returns:
        The numbers of each epoch; none where there is no such picture.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return dict(json.loads(image.info[KEY]))
    except (OSError, KeyError, TypeError, ValueError):
        return {}


def draw(history: History, tests: Sequence[Numbers]) -> Figure:
    """Draws the curves.

    Args:
        history: As for ``write_curves``.
        tests: As for ``write_curves``.

    Returns:
        The picture, of which pyplot has no record.
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
    """An empty picture, which needs no display.

    Args:
        width: In inches.
        height: In inches.
    """
    from matplotlib.figure import Figure

    # Without pyplot it is drawn with Agg.
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def tidy(axes: Axes) -> None:
    """Gives a panel that is drawn its grid, and a legend where curves have names.

    Args:
        axes: The panel.
    """
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)


def is_rate(name: str) -> bool:
    """Whether a number is a learning rate, as recipes call it: ``lr``, ``lr_g``, ``old_lr``.

    Args:
        name: Its name.
    """
    return "lr" in name.lower().split("_")


def _panels(entries: Sequence[Numbers]) -> tuple[list[str], list[str]]:
    """What there is to show, whatever the stage, the loss first; and the learning rates."""
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
        # With its stage a number is there twice: see metrics.py.
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
    """False where no epoch has the number."""
    points = [(epoch, numbers[name]) for epoch, numbers in history.items() if name in numbers]
    if points:
        # Points that are close together make a line thick.
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
