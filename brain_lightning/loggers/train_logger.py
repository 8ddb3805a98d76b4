"""A train logger for recipes that writes to Lightning's loggers."""

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

# Keys of stats_meta, in any case, whose value is the position of an entry.
POSITIONS = ("epoch", "steps", "step")
# The same for the test of a checkpoint.
TESTED = ("epoch loaded",)


class LightningTrainLogger:
    """Sends the metrics that a recipe reports to Lightning's loggers.

    It replaces any ``speechbrain.utils.train_logger`` in the recipe's YAML file:

        train_logger: !new:brain_lightning.LightningTrainLogger
            logger: !new:lightning.pytorch.loggers.CSVLogger
                save_dir: !ref <output_folder>

    Metrics have the names that a Trainer uses, such as ``train_loss`` and ``valid_WER``, and
    are logged at their epoch. Only rank 0 writes.

    A resumed run continues its log: the version of the logger if it is set, otherwise the
    newest version that a train logger has written. The log has each epoch once, because the
    first epoch that is logged again replaces the entries from this epoch on. If a finished run
    is tested again, a CSV file has only the new test, and TensorBoard has both tests. W&B and
    MLflow skip the new test if it is equal. Any other run writes a new version, or replaces
    the version that is set. Runs of SpeechBrain's own loop also do this, because only a
    Trainer notifies the train logger that a run is resumed.

    If a logger is also a logger of the Trainer, the Trainer logs to it, with a new version at
    each start.

    Args:
        logger: One of Lightning's loggers, or a list of them.

    Attributes:
        loggers: List of the loggers.
        fed_by_trainer: Loggers to which the Trainer currently logs the same metrics.

    Raises:
        BrainTypeError: ``logger`` is of another type.
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
        """Sets whether the run resumes the run of an earlier process. The Trainer calls this.

        Only the first call has an effect. Nothing is written yet.

        Args:
            goes_on: Whether a checkpoint was recovered.
            position: The last completed epoch.
            hyperparameters: Hyperparameters of the run, for all loggers.
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
        """Logs the metrics of an epoch or of a test.

        Args:
            stats_meta: Values of the epoch: its number as ``epoch``, the learning rate, …
            train_stats: Metrics of TRAIN: numbers, lists of numbers, whose mean is logged, and
                dictionaries of these.
            valid_stats: Metrics of VALID.
            test_stats: Metrics of TEST. They are logged at ``Epoch loaded`` if ``stats_meta``
                has it, otherwise at the last epoch.
            verbose: Whether to log the metrics also as one line with Python's logging, as
                SpeechBrain's FileTrainLogger does.
        """
        # No barrier as in SpeechBrain's train loggers, because TEST may run on one rank only.
        if not if_main_process():
            return
        stats = {Stage.TRAIN: train_stats, Stage.VALID: valid_stats, Stage.TEST: test_stats}
        named = dict(leaves(stats_meta))
        for stage, values in stats.items():
            named |= {staged(stage, name): value for name, value in leaves(values)}
        numbers = numbers_in(named)
        for name in named.keys() - numbers.keys():
            self._warn(f"log_stats: {name!r} is not a number, so it is not logged")
        entry = self._entry(numbers)
        for each in self._logs():
            is_fed = any(each.logger is fed for fed in self.fed_by_trainer)
            if not is_fed and not each.write(entry):
                self._warn(f"{_kind(each)} skips metrics that its run already has")
        if verbose:
            log.info(_line(stats_meta, stats))

    def log_audio(self, name: str, value: Any, sample_rate: int) -> None:
        """Logs audio at the epoch that was logged last.

        Args:
            name: Name of the audio.
            value: Samples between -1 and 1.
            sample_rate: Number of samples per second.
        """
        if not if_main_process():
            return
        for each in self._logs():
            if not log_audio(each.logger, name, value, sample_rate, self._position):
                self._warn(f"{_kind(each)} does not support audio, so {name!r} is not logged")
            each.logger.save()

    def log_figure(self, name: str, value: Any) -> None:
        """Logs a figure at the epoch that was logged last.

        Args:
            name: Name of the figure.
            value: A spectrogram, or a matplotlib figure.
        """
        if not if_main_process():
            return
        if importlib.util.find_spec("matplotlib") is None:
            self._warn(
                f"figure {name!r} is not logged, because matplotlib is not installed. Run pip "
                "install matplotlib."
            )
            return
        for each in self._logs():
            # Each logger gets a new figure, because TensorBoard closes it.
            figure = value if hasattr(value, "savefig") else spectrogram(value)
            if not log_figure(each.logger, name, figure, self._position):
                self._warn(
                    f"{_kind(each)} does not support figures, so {name!r} is not logged"
                )
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
        """Yields the logs. They are opened here, when it is known whether the run resumes."""
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
    """Stops a recipe's train logger from logging to loggers that the Trainer logs to.

    Args:
        brain: The Brain, whose train logger may be a ``LightningTrainLogger``.
        loggers: Loggers of the Trainer.
        temporary: Records the changes.
    """
    if (train_logger := _train_logger_of(brain)) is not None:
        temporary.set(train_logger, "fed_by_trainer", loggers)


def begin_log(brain: BrainProtocol, resumes: bool, position: int) -> None:
    """Calls ``begin_run`` of a recipe's train logger, before training changes anything.

    Args:
        brain: The Brain, whose train logger may be a ``LightningTrainLogger``.
        resumes: Whether a checkpoint was recovered.
        position: The last completed epoch.
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
                f"logger={each!r} is not a logger. Use a logger of lightning.pytorch.loggers, "
                "such as CSVLogger, or a list of loggers."
            )
    return list(loggers)


def _first_of(known: Sequence[str], numbers: Mapping[str, float]) -> str | None:
    names = {name.lower(): name for name, number in numbers.items() if math.isfinite(number)}
    return next((names[name] for name in known if name in names), None)


def _kind(of: Log) -> str:
    return type(of.logger).__name__


def _line(stats_meta: Mapping[str, Any], stats: Mapping[Stage, Any]) -> str:
    """Returns the line that SpeechBrain's FileTrainLogger would write."""
    reported = {stage: values for stage, values in stats.items() if values is not None}
    parts = [_words(values, f"{stage.name.lower()} ") for stage, values in reported.items()]
    return " - ".join([_words(stats_meta, ""), *parts])


def _words(stats: Mapping[str, Any], before: str) -> str:
    return ", ".join(f"{before}{name}: {_text(value)}" for name, value in stats.items())


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2f}" if 1.0 < value < 100.0 else f"{value:.2e}"
