"""The train logger of a recipe, over Lightning's loggers."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger

from brain_lightning.distributed.communication import if_main_process
from brain_lightning.errors import BrainTypeError
from brain_lightning.protocol import BrainProtocol, hparam
from brain_lightning.stage import Stage
from brain_lightning.stages.metrics import leaves, numbers_in, staged
from brain_lightning.temporary import TemporaryAttributes

from .hyperparameters import hyperparameters
from .log_versions import Entry, Log, is_of_test, log_class
from .media import log_audio, log_figure, spectrogram

log = logging.getLogger(__name__)

# Names, in any case, of the number in stats_meta at which an entry is logged.
POSITIONS = ("epoch", "steps", "step")
# The same where a checkpoint is tested.
TESTED = ("epoch loaded",)


class LightningTrainLogger:
    """Logs what a recipe reports to Lightning's loggers.

    Replaces any ``speechbrain.utils.train_logger``, in the recipe's YAML file:

        train_logger: !new:brain_lightning.LightningTrainLogger
            logger: !new:lightning.pytorch.loggers.CSVLogger
                save_dir: !ref <output_folder>

    Numbers have the names of a Trainer's metrics, ``train_loss`` and ``valid_WER``, and are
    logged at their epoch. Only the main process writes.

    A resumed run continues its log: the version that was asked for, else the newest that a
    train logger has written. Each epoch is there once: the first epoch that is logged again
    supersedes what is there from that epoch on. A finished run that is tested again replaces
    the test in a CSV file, leaves it out of W&B and MLflow where it is equal, and adds to it
    in TensorBoard. Any other run has a new version, or replaces the one that was asked for;
    so does a run of SpeechBrain's own loop, since only a Trainer says that a run is resumed.

    A logger that is the Trainer's too is fed by the Trainer, with a new version at each start.

    Args:
        logger: One of Lightning's loggers, or several.

    Attributes:
        loggers: All of them.
        fed_by_trainer: Those to which a Trainer logs the same numbers at this time.

    Raises:
        BrainTypeError: ``logger`` is something else.
    """

    def __init__(self, logger: Logger | Sequence[Logger]) -> None:
        self.loggers = _checked(logger)
        self.fed_by_trainer: Sequence[Logger] = ()
        self._resumes: bool | None = None
        self._position = 0
        self._hyperparameters: Mapping[str, Any] = {}
        self._warned: set[str] = set()
        self._opened: list[Log] = []

    def begin_run(
        self,
        goes_on: bool,
        position: int = 0,
        hyperparameters: Mapping[str, Any] = {},
    ) -> None:
        """Says whether the run resumes that of an earlier process; a Trainer calls this.

        The first call counts. Nothing is written yet.

        Args:
            goes_on: Whether something was recovered.
            position: The last epoch that is over.
            hyperparameters: Of the run, for each of the loggers.
        """
        if self._resumes is None:
            self._resumes = goes_on
            self._hyperparameters = hyperparameters
            self._position = max(self._position, position)

    def log_stats(
        self,
        stats_meta: Mapping[str, Any],
        train_stats: Mapping[str, Any] | None = None,
        valid_stats: Mapping[str, Any] | None = None,
        test_stats: Mapping[str, Any] | None = None,
        verbose: bool = True,
    ) -> None:
        """Logs what is known at the end of an epoch.

        Args:
            stats_meta: Of the epoch: its number as ``epoch``, the learning rate, …
            train_stats: Of TRAIN: numbers, lists of numbers, of which the mean is logged, and
                dictionaries of them.
            valid_stats: Of VALID.
            test_stats: Of TEST; logged at the ``Epoch loaded``, or at the last epoch.
            verbose: Whether to log it also as one line of Python's logging, as
                SpeechBrain's FileTrainLogger does.
        """
        # SpeechBrain's waits for the other processes; one may be alone, in a test.
        if not if_main_process():
            return
        stats = {Stage.TRAIN: train_stats, Stage.VALID: valid_stats, Stage.TEST: test_stats}
        named = dict(leaves(stats_meta))
        for stage, values in stats.items():
            named |= {staged(stage, name): value for name, value in leaves(values)}
        numbers = numbers_in(named)
        for name in named.keys() - numbers.keys():
            self._warn(f"log_stats: {name!r} is no number, and is not logged")
        entry = self._entry(numbers)
        for each in self._logs():
            is_fed = any(each.logger is fed for fed in self.fed_by_trainer)
            if not is_fed and not each.write(entry):
                self._warn(f"{_kind(each)} leaves out what its run has already")
        if verbose:
            log.info(_line(stats_meta, stats))

    def log_audio(self, name: str, value: Any, sample_rate: int) -> None:
        """Logs a sound, at the epoch that was logged last.

        Args:
            name: Of the sound.
            value: Its samples, between -1 and 1.
            sample_rate: Samples in a second.
        """
        if not if_main_process():
            return
        for each in self._logs():
            if not log_audio(each.logger, name, value, sample_rate, self._position):
                self._warn(f"{_kind(each)} does not log audio ({name!r})")
            each.logger.save()

    def log_figure(self, name: str, value: Any) -> None:
        """Logs a picture, at the epoch that was logged last.

        Args:
            name: Of the picture.
            value: A spectrogram, or a figure of matplotlib's.
        """
        if not if_main_process():
            return
        if importlib.util.find_spec("matplotlib") is None:
            self._warn(f"figures ({name!r}) are not logged without matplotlib: install it")
            return
        for each in self._logs():
            # A figure for each: TensorBoard closes it.
            figure = value if hasattr(value, "savefig") else spectrogram(value)
            if not log_figure(each.logger, name, figure, self._position):
                self._warn(f"{_kind(each)} does not log figures ({name!r})")
            each.logger.save()

    def _entry(self, numbers: dict[str, float]) -> Entry:
        name, tested = _first_of(POSITIONS, numbers), _first_of(TESTED, numbers)
        is_test = is_of_test(numbers)
        if name or tested:
            self._position = int(numbers[name or tested or ""])
        elif not is_test:
            self._position += 1
        return Entry(numbers, name, self._position, is_test)

    def _logs(self) -> Iterator[Log]:
        """Each is opened with its first entry: then it is known whether the run resumes."""
        for index, each in enumerate(self.loggers):
            if index == len(self._opened):
                opened = log_class(each)(each, index, bool(self._resumes))
                self._opened.append(opened)
                is_fed = any(each is fed for fed in self.fed_by_trainer)
                if self._hyperparameters and not is_fed:
                    opened.write_hyperparameters(dict(self._hyperparameters))
            yield self._opened[index]

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            log.warning("%s.", message)


def leave_to_trainer(
    brain: BrainProtocol, loggers: Sequence[Logger], temporary: TemporaryAttributes
) -> None:
    """Keeps a recipe's train logger from logging twice to a logger that is the Trainer's too.

    Args:
        brain: The Brain whose train logger may be a ``LightningTrainLogger``.
        loggers: The Trainer's.
        temporary: Records what is changed.
    """
    if (train_logger := _train_logger_of(brain)) is not None:
        temporary.set(train_logger, "fed_by_trainer", loggers)


def begin_log(brain: BrainProtocol, resumes: bool, position: int) -> None:
    """Calls ``begin_run`` of a recipe's train logger, before training changes anything.

    Args:
        brain: The Brain whose train logger may be a ``LightningTrainLogger``.
        resumes: Whether something was recovered.
        position: The last epoch that is over.
    """
    if (train_logger := _train_logger_of(brain)) is not None:
        train_logger.begin_run(resumes, position, hyperparameters(brain))


def _train_logger_of(brain: BrainProtocol) -> LightningTrainLogger | None:
    found = hparam(brain, "train_logger")
    return found if isinstance(found, LightningTrainLogger) else None


def _checked(logger: object) -> list[Logger]:
    loggers = logger if isinstance(logger, (list, tuple)) else [logger]
    for each in loggers:
        if not isinstance(each, Logger):
            raise BrainTypeError(
                f"logger must be one of lightning.pytorch.loggers, such as CSVLogger, or a "
                f"list of them, got {each!r}"
            )
    return list(loggers)


def _first_of(known: Sequence[str], numbers: Mapping[str, float]) -> str | None:
    names = {name.lower(): name for name, number in numbers.items() if math.isfinite(number)}
    return next((names[name] for name in known if name in names), None)


def _kind(of: Log) -> str:
    return type(of.logger).__name__


def _line(stats_meta: Mapping[str, Any], stats: Mapping[Stage, Any]) -> str:
    """The line that SpeechBrain's FileTrainLogger writes."""
    reported = {stage: values for stage, values in stats.items() if values is not None}
    parts = [_words(values, f"{stage.name.lower()} ") for stage, values in reported.items()]
    return " - ".join([_words(stats_meta, ""), *parts])


def _words(stats: Mapping[str, Any], before: str) -> str:
    return ", ".join(f"{before}{name}: {_text(value)}" for name, value in stats.items())


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2f}" if 1.0 < value < 100.0 else f"{value:.2e}"
