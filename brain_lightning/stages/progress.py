"""The progress of a stage: a bar in a terminal, or a line every few seconds in a log file."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tqdm import TqdmWarning
from tqdm import tqdm as text_bar

from brain_lightning.stage import Stage

if TYPE_CHECKING:
    from .base import RunStage

with warnings.catch_warnings():
    # A notebook without ipywidgets shows lines, without a warning. tqdm.auto is not used,
    # because its bar calls iter() when it is created: workers would start too early.
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.autonotebook import tqdm as best_bar


class _Loss(text_bar):  # type: ignore[type-arg]  # no generic at run time
    """Shows the running loss. The loss is read only when the display is updated.

    Args:
        stage: Stage that runs.
        **kwargs: Arguments of tqdm.
    """

    def __init__(self, stage: RunStage, **kwargs: Any) -> None:
        self._stage = stage
        super().__init__(**kwargs)

    @property
    def format_dict(self) -> Any:
        """Values to display. tqdm reads this property every 0.1 seconds."""
        self.set_postfix(self._stage.running_loss(), refresh=False)
        return super().format_dict

    def close(self) -> None:
        """Shows the number of completed batches, also if a limit ended the pass."""
        if not getattr(self, "disable", True):
            self.n = max(self.n, self._stage.brain.step)
        super().close()


class LossBar(_Loss, best_bar):  # type: ignore[type-arg]
    """Bar with the running loss. At the end it shows the average loss of the stage."""


class LossLines(_Loss):
    """Progress without a terminal: a line every few seconds, and one at the end."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Writes a line if the interval is over or the stage ends.

        Args:
            msg: Ignored.
            pos: Ignored.
        """
        # tqdm.write also calls display(), and close() calls it after the last batch.
        if self.disable or self.last_print_n < self.n != self.total:
            # close() itself writes the line break after the last line.
            self.fp.write(f"{self}{'' if self.disable else chr(10)}")

    def clear(self, *_: Any, **__: Any) -> None:
        """Does nothing, because written lines stay."""


def is_watched() -> bool:
    """Whether standard error is a terminal, or a notebook can show bars."""
    isatty = getattr(sys.stderr, "isatty", None)
    return best_bar is not text_bar or bool(isatty and isatty())


def progress_bar(
    stage: RunStage, batches: Iterable[Any], total: int | None
) -> LossBar | LossLines:
    """Creates SpeechBrain's bar over the batches of a stage, or lines without a terminal.

    Args:
        stage: Stage that is starting. The options of its Brain choose between bar and lines,
            and the color. A resumed training epoch starts at the Brain's ``step``.
        batches: The batches.
        total: Number of batches, or None if it is unknown.

    Returns:
        The bar. Iterating it yields the batches.
    """
    brain, name = stage.brain, stage.kind.name
    about: dict[str, Any] = {
        "stage": stage,
        "iterable": batches,
        "total": total,
        "desc": name if stage.epoch is None else f"{name} epoch {stage.epoch}",
        "initial": brain.step if stage.kind is Stage.TRAIN else 0,
        "disable": not stage.run.trainer.shows_bar,
    }
    settings = brain._lightning
    if settings.progress == "plain" or (settings.progress == "auto" and not is_watched()):
        # ncols=0 draws no bar, and miniters=1 checks the clock after each batch.
        return LossLines(ncols=0, mininterval=settings.progress_interval, miniters=1, **about)
    # None, because a notebook does not accept an empty color.
    colour = brain.tqdm_barcolor[name.lower()] or None
    return LossBar(dynamic_ncols=True, colour=colour, **about)
