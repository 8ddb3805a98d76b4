"""SpeechBrain's TrainLogger over Lightning's loggers."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from lightning.pytorch.loggers import Logger

from ._log_resume import is_there, resume
from .borrowed import Borrowed
from .distributed import if_main_process
from .errors import BrainTypeError
from .log_media import log_audio, log_figure, spectrogram
from .metrics import STAGES_OF_STATS, leaves, numbers_in, staged
from .protocol import BrainProtocol

log = logging.getLogger(__name__)

Method = TypeVar("Method", bound=Callable[..., None])

# Names by which recipes say in stats_meta where an entry belongs, in any case.
POSITIONS = ("epoch", "steps", "step")
# What they say where a checkpoint is tested.
TESTED = "epoch loaded"


def _on_main_process(method: Method) -> Method:
    """Unlike SpeechBrain's, does not wait for the others: one may be alone, in a test."""

    @functools.wraps(method)
    def on_main(*args: Any, **kwargs: Any) -> None:
        if if_main_process():
            method(*args, **kwargs)

    return on_main  # type: ignore[return-value]


class LightningTrainLogger:
    """Hands what a recipe reports to Lightning's loggers.

    Takes the place of any ``speechbrain.utils.train_logger``, in the recipe's YAML file:

        train_logger: !new:brain_lightning.LightningTrainLogger
            logger: !new:lightning.pytorch.loggers.CSVLogger
                save_dir: !ref <output_folder>

    Numbers have the names that a Trainer's metrics have, ``train_loss`` and ``valid_WER``, and
    stand at their epoch. A run that goes on does so in its log, where each epoch is found
    once. Only the main process writes.

    Args:
        logger: One of Lightning's loggers, or several.

    Attributes:
        loggers: All of them.
        fed_by_trainer: Those that a Trainer gives the same numbers at this time.

    Raises:
        BrainTypeError: ``logger`` is something else.
    """

    def __init__(self, logger: Logger | Sequence[Logger]) -> None:
        self.loggers = _checked(logger)
        self.fed_by_trainer: Sequence[Logger] = ()
        # What is in each log that cannot be changed, once it was looked at.
        self._last: dict[int, dict[str, float]] = {}
        self._position = 0
        self._told: set[str] = set()

    @_on_main_process
    def log_stats(
        self,
        stats_meta: Mapping[str, Any],
        train_stats: Mapping[str, Any] | None = None,
        valid_stats: Mapping[str, Any] | None = None,
        test_stats: Mapping[str, Any] | None = None,
        verbose: bool = False,
    ) -> None:
        """Logs what is known at the end of an epoch.

        Args:
            stats_meta: Of the epoch: its number as ``epoch``, the learning rate, …
            train_stats: Of TRAIN: numbers, lists of numbers, of which the mean is logged, and
                dictionaries of them.
            valid_stats: Of VALID.
            test_stats: Of TEST; stand at the ``Epoch loaded``, or at the last epoch.
            verbose: Whether to say it all in one line of Python's logging, too.
        """
        stats = {
            "train_stats": train_stats, "valid_stats": valid_stats, "test_stats": test_stats
        }  # fmt: skip
        named = dict(_named(stats_meta, stats))
        numbers = numbers_in(named)
        self._tell_of_others(named, numbers)
        name = _position_name(numbers)
        self._move_to(numbers, name)
        for logger in self.loggers:
            if not any(logger is each for each in self.fed_by_trainer):
                self._log(logger, numbers, name)
        if verbose:
            log.info(_line(stats_meta, stats))

    @_on_main_process
    def log_audio(self, name: str, value: Any, sample_rate: int) -> None:
        """Logs a sound, at the epoch that was logged last.

        Args:
            name: Of the sound.
            value: Its samples, between -1 and 1.
            sample_rate: Samples in a second.
        """
        for logger in self.loggers:
            if not log_audio(logger, name, value, sample_rate, self._position):
                self._tell(f"{type(logger).__name__} has no place for audio ({name!r})")

    @_on_main_process
    def log_figure(self, name: str, value: Any) -> None:
        """Logs a picture, at the epoch that was logged last.

        Args:
            name: Of the picture.
            value: A spectrogram, or a figure of matplotlib's.
        """
        if importlib.util.find_spec("matplotlib") is None:
            self._tell(f"figures ({name!r}) are not logged without matplotlib: install it")
            return
        for logger in self.loggers:
            # A figure for each: TensorBoard closes it.
            figure = value if hasattr(value, "savefig") else spectrogram(value)
            if not log_figure(logger, name, figure, self._position):
                self._tell(f"{type(logger).__name__} has no place for figures ({name!r})")

    def _move_to(self, numbers: Mapping[str, float], name: str | None) -> None:
        tested = next((n for n in numbers if n.lower() == TESTED), None)
        if name or tested:
            self._position = int(numbers[name or tested or ""])
        elif not any(n.startswith("test_") for n in numbers):
            self._position += 1

    def _log(self, logger: Logger, numbers: Mapping[str, float], name: str | None) -> None:
        if id(logger) not in self._last:
            start = math.inf if name is None else numbers[name]
            self._last[id(logger)] = resume(logger, start)
        if is_there(self._last[id(logger)], name, numbers):
            self._tell(f"{type(logger).__name__} leaves out what its run has already")
            return
        logger.log_metrics(dict(numbers), self._position)
        logger.save()

    def _tell_of_others(self, named: Mapping[str, Any], numbers: Mapping[str, float]) -> None:
        for name in named.keys() - numbers.keys():
            self._tell(f"log_stats: {name!r} is no number, and is not logged")

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            log.warning("%s.", message)


def lend_loggers(brain: BrainProtocol, loggers: Sequence[Logger], borrowed: Borrowed) -> None:
    """Keeps what a recipe reports from being logged twice by a logger that a Trainer has too.

    Args:
        brain: The Brain whose train logger may be a ``LightningTrainLogger``.
        loggers: The Trainer's.
        borrowed: Takes note of what is changed.
    """
    train_logger = getattr(getattr(brain, "hparams", None), "train_logger", None)
    if isinstance(train_logger, LightningTrainLogger):
        borrowed.set(train_logger, "fed_by_trainer", loggers)


def _checked(logger: object) -> list[Logger]:
    loggers = logger if isinstance(logger, (list, tuple)) else [logger]
    for each in loggers:
        if not isinstance(each, Logger):
            raise BrainTypeError(
                f"logger must be one of lightning.pytorch.loggers, such as CSVLogger, or a "
                f"list of them, got {each!r}"
            )
    return list(loggers)


def _named(stats_meta: Any, stats: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from leaves(stats_meta)
    for argument, stage in STAGES_OF_STATS.items():
        for name, value in leaves(stats[argument]):
            yield staged(stage, name), value


def _position_name(numbers: Mapping[str, float]) -> str | None:
    names = {name.lower(): name for name in numbers}
    return next((names[name] for name in POSITIONS if name in names), None)


def _line(stats_meta: Mapping[str, Any], stats: Mapping[str, Any]) -> str:
    """The line that SpeechBrain's FileTrainLogger writes."""
    parts = [_words(stats_meta, "")]
    parts += [
        _words(stats[argument], f"{stage.name.lower()} ")
        for argument, stage in STAGES_OF_STATS.items()
        if stats[argument] is not None
    ]
    return " - ".join(parts)


def _words(stats: Mapping[str, Any], before: str) -> str:
    return ", ".join(f"{before}{name}: {_text(value)}" for name, value in stats.items())


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2f}" if 1.0 < value < 100.0 else f"{value:.2e}"
