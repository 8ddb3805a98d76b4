"""The progress of a stage: a bar in a terminal, or from time to time a line in a log file."""

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
    # A notebook without ipywidgets gets lines, and no warning. Not tqdm.auto, whose bar
    # calls iter() before there is anything to iterate: workers would start too early.
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.autonotebook import tqdm as best_bar


class _Loss(text_bar):  # type: ignore[type-arg]  # no generic at run time
    """Shows the running loss, which is read when the bar is.

    Args:
        stage: The stage that runs.
        **kwargs: Arguments of tqdm.
    """

    def __init__(self, stage: RunStage, **kwargs: Any) -> None:
        self._stage = stage
        super().__init__(**kwargs)

    @property
    def format_dict(self) -> Any:
        """What is shown; tqdm reads it every tenth of a second."""
        self.set_postfix(self._stage.running_loss(), refresh=False)
        return super().format_dict

    def close(self) -> None:
        """Ends at the batches that are done: tqdm does not see that a limit ended the pass."""
        if not getattr(self, "disable", True):
            self.n = max(self.n, self._stage.brain.step)
        super().close()


class LossBar(_Loss, best_bar):  # type: ignore[type-arg]
    """A bar with the running loss; at its end it shows the average of the stage."""


class LossLines(_Loss):
    """The same where there is no terminal: a line every few seconds, and a last one."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Writes a line, if one is due.

        Args:
            msg: Ignored.
            pos: Ignored.
        """
        # tqdm.write calls it too, and after the last batch close() does.
        if self.disable or self.last_print_n < self.n != self.total:
            # close() ends the last line itself.
            self.fp.write(f"{self}{'' if self.disable else chr(10)}")

    def clear(self, *_: Any, **__: Any) -> None:
        """Nothing: what is written stays."""


def is_watched() -> bool:
    """Whether there is a terminal, or a notebook that shows bars."""
    isatty = getattr(sys.stderr, "isatty", None)
    return best_bar is not text_bar or bool(isatty and isatty())


def progress_bar(
    stage: RunStage, batches: Iterable[Any], total: int | None
) -> LossBar | LossLines:
    """SpeechBrain's bar over the batches of a stage, or lines where there is no terminal.

    Args:
        stage: The stage that is starting. The options of its Brain say which, and in
            which colour; a resumed training epoch starts at the Brain's ``step``.
        batches: The batches.
        total: How many there are, or None where that is not known.

    Returns:
        The bar, which yields the batches.
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
        # No bar, and the clock is read after each batch.
        return LossLines(ncols=0, mininterval=settings.progress_interval, miniters=1, **about)
    # None: a notebook does not take an empty colour.
    colour = brain.tqdm_barcolor[name.lower()] or None
    return LossBar(dynamic_ncols=True, colour=colour, **about)
