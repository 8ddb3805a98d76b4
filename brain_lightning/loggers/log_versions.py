"""Continues the log of a resumed run, with each epoch in it once.

If a run is killed after it has logged an epoch and before it has saved a checkpoint, the
resumed run logs that epoch again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from brain_lightning.lightning_internals import loggers as internals

from .csv_rows import Row, rows_of


class Entry(NamedTuple):
    """The metrics that are logged in one call.

    Attributes:
        numbers: Metrics by name.
        name: Name of the metric that is the position, such as ``epoch``.
        position: Value at which the entry is logged, such as the number of the epoch.
        is_test: Whether the entry has only metrics of TEST.
    """

    numbers: dict[str, float]
    name: str | None
    position: int
    is_test: bool


def is_of_test(names: Iterable[str]) -> bool:
    """Returns whether an entry has only metrics of TEST, and none of TRAIN or VALID.

    Args:
        names: Names of its metrics.
    """
    stages = {name.partition("_")[0] for name in names}
    return "test" in stages and not stages & {"train", "valid"}


class Log:
    """Writes the entries of a train logger to one logger. This base class writes all entries.

    It is created just before the first entry. Subclasses then find the log to continue.

    Args:
        logger: The logger.
        index: Index of the logger in its train logger.
        resumes: Whether the run resumes the run of an earlier process.

    Attributes:
        logger: The logger.
    """

    def __init__(self, logger: Logger, index: int, resumes: bool) -> None:
        self.logger = logger
        self._index = index
        # Kinds of entries (is_test) of an earlier process that may be logged again.
        self._repeated = {True, False} if self._begin(resumes) else set()

    def write(self, entry: Entry) -> bool:
        """Logs an entry. The first entry replaces the entries that the run repeats.

        Args:
            entry: The entry.

        Returns:
            False if the entry was not logged, because the log has it and cannot be changed.
        """
        if entry.is_test in self._repeated and (entry.is_test or entry.name is not None):
            self._repeated.remove(entry.is_test)
            self._replace(entry)
        if self._has(entry):
            return False
        self.logger.log_metrics(dict(entry.numbers), entry.position)
        self.logger.save()
        return True

    def write_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Logs the hyperparameters of the run.

        Args:
            hyperparameters: Values by name.
        """
        self.logger.log_hyperparams(hyperparameters)

    def _begin(self, resumes: bool) -> bool:
        """Prepares the log, and returns whether it may have entries of earlier processes."""
        return False

    def _replace(self, entry: Entry) -> None: ...

    def _has(self, entry: Entry) -> bool:
        return False


class _Versions(Log):
    """A log with a versioned folder for each run.

    A hidden file marks folders of train loggers, because a Trainer may write to other versions
    in the same parent folder.
    """

    logger: CSVLogger | TensorBoardLogger
    _has_earlier = False

    @property
    def _mark(self) -> Path:
        name = f".train_log-{type(self.logger).__name__}-{self._index}"
        return Path(self.logger.log_dir, name)

    def _begin(self, resumes: bool) -> bool:
        # Remote logs, and logs that are open, for example by a Trainer, are left to Lightning.
        if "://" in str(self.logger.save_dir) or internals.is_open(self.logger):
            return False
        if resumes and not internals.has_version(self.logger):
            self._choose_version()
        self._has_earlier = resumes and self._mark.exists()
        self._continue_log() if resumes else self._start_new()
        # Creates the folder. The mark is created last, because Lightning warns if the folder
        # has files.
        self.logger.save()
        self._mark.touch()
        return resumes

    def _choose_version(self) -> None:
        """Selects the newest version with the mark, or a new version if there is none."""
        new = self.logger.version
        assert isinstance(new, int)
        for version in range(new - 1, -1, -1):
            internals.set_version(self.logger, version)
            if self._mark.exists():
                return
        internals.set_version(self.logger, new)

    def _continue_log(self) -> None: ...

    def _start_new(self) -> None: ...


class _CSVLog(_Versions):
    """A CSV log. Lightning deletes an existing file, so its rows are logged again."""

    logger: CSVLogger

    @property
    def _file(self) -> Path:
        return Path(self.logger.log_dir, ExperimentWriter.NAME_METRICS_FILE)

    @property
    def _backup(self) -> Path:
        """Copy of the rows until they are in the new file, in case the process is killed."""
        return self._file.with_suffix(".before")

    def _continue_log(self) -> None:
        self._rewrite(lambda _: True)

    def _start_new(self) -> None:
        self._backup.unlink(missing_ok=True)

    def _replace(self, entry: Entry) -> None:
        if entry.is_test:
            self._rewrite(
                lambda row: row["step"] != str(entry.position) or not self._tests(row)
            )
        else:
            start = entry.numbers[entry.name or ""]
            self._rewrite(lambda row: float(row["step"]) < start)

    def _tests(self, row: Row) -> bool:
        before = internals.name_prefix(self.logger)
        return is_of_test(name.removeprefix(before) for name, value in row.items() if value)

    def _rewrite(self, is_kept: Callable[[Row], bool]) -> None:
        if self._file.is_file() and not self._backup.is_file():
            self._file.replace(self._backup)
        self._file.unlink(missing_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Experiment logs directory")
            writer = self.logger.experiment
        writer.metrics_keys.clear()
        for row in filter(is_kept, filter(_is_of_numbers, rows_of(self._backup))):
            # The strings are written unchanged: names have their prefix, and numbers all
            # digits.
            values: Any = {name: value for name, value in row.items() if value}
            writer.log_metrics(values, int(values.pop("step")))
        self.logger.save()
        self._backup.unlink(missing_ok=True)


def _is_of_numbers(row: Row) -> bool:
    try:
        int(row["step"])
        for value in row.values():
            if value != "":
                float(value)
    except ValueError:
        return False
    return True


class _TensorBoardLog(_Versions):
    """A TensorBoard log. TensorBoard hides events after the ``purge_step`` of a later file."""

    logger: TensorBoardLogger

    def write_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Logs them only once, because each call adds a value to the curve ``hp_metric``."""
        if not self._has_earlier:
            super().write_hyperparameters(hyperparameters)

    def _start_new(self) -> None:
        if self._mark.exists():
            self._purge(0)

    def _replace(self, entry: Entry) -> None:
        # A test cannot be purged without the epochs after it.
        if not entry.is_test:
            self._purge(int(entry.numbers[entry.name or ""]))

    def _purge(self, start: int) -> None:
        # The next entry starts a new file.
        self.logger.experiment.close()
        self.logger.experiment.purge_step = start


class _ServiceLog(Log):
    """A W&B or MLflow log, whose entries cannot be removed. Existing entries are skipped."""

    logger: WandbLogger | MLFlowLogger

    def _begin(self, resumes: bool) -> bool:
        # The last value of each metric from earlier processes.
        self._last = self._last_numbers() if resumes else {}
        return resumes

    def write_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Logs them, except for those that MLflow has, because MLflow cannot change them."""
        logger = self.logger
        if isinstance(logger, MLFlowLogger):
            there = logger.experiment.get_run(logger.run_id).data.params
            hyperparameters = {n: v for n, v in hyperparameters.items() if n not in there}
        logger.log_hyperparams(hyperparameters)

    def _last_numbers(self) -> dict[str, float]:
        logger = self.logger
        if isinstance(logger, WandbLogger):
            found = dict(logger.experiment.summary)
        else:
            found = logger.experiment.get_run(logger.run_id).data.metrics
        return {
            name.removeprefix(internals.name_prefix(logger)): number
            for name, number in found.items()
        }

    def _has(self, entry: Entry) -> bool:
        """Returns whether the log has an entry: of an earlier epoch, or with equal values."""
        numbers, last, name = entry.numbers, self._last, entry.name
        is_repeated = numbers.items() <= last.items()
        if entry.is_test or name is None or name not in last:
            return entry.is_test and is_repeated
        return numbers[name] < last[name] or (numbers[name] == last[name] and is_repeated)


def log_class(logger: Logger) -> type[Log]:
    """Returns the class that writes to a logger.

    Args:
        logger: The logger.
    """
    if isinstance(logger, CSVLogger):
        return _CSVLog
    if isinstance(logger, TensorBoardLogger):
        return _TensorBoardLog
    return _ServiceLog if isinstance(logger, (WandbLogger, MLFlowLogger)) else Log
