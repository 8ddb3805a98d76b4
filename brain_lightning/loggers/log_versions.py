"""A log that continues where a run resumes, with each epoch in it once.

A run that is killed after it has logged an epoch and before it has saved it logs that epoch
again.
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
    """What is logged at one time.

    Attributes:
        numbers: By name.
        name: Of the number that says where it belongs, such as ``epoch``.
        position: Where it stands.
        is_test: Whether it speaks of TEST alone.
    """

    numbers: dict[str, float]
    name: str | None
    position: int
    is_test: bool


def is_of_test(names: Iterable[str]) -> bool:
    """Whether an entry speaks of TEST alone, and of no epoch.

    Args:
        names: Of its numbers.
    """
    stages = {name.partition("_")[0] for name in names}
    return "test" in stages and not stages & {"train", "valid"}


class Log:
    """What one logger of a train logger writes: whatever it is given.

    It is made just before its first entry, and finds what that adds to.

    Args:
        logger: The logger.
        index: Of the logger among those of its train logger.
        resumes: Whether this is a log of earlier processes.

    Attributes:
        logger: The logger.
    """

    def __init__(self, logger: Logger, index: int, resumes: bool) -> None:
        self.logger = logger
        self._index = index
        # Of which an earlier process may have entries that are made again: epochs, tests.
        self._repeated = {True, False} if self._begin(resumes) else set()

    def write(self, entry: Entry) -> bool:
        """Logs an entry; the first one replaces what it repeats.

        Args:
            entry: The entry.

        Returns:
            False where it is there already, and cannot be changed.
        """
        if entry.is_test in self._repeated and (entry.is_test or entry.name is not None):
            self._repeated.remove(entry.is_test)
            self._supersede(entry)
        if self._has(entry):
            return False
        self.logger.log_metrics(dict(entry.numbers), entry.position)
        self.logger.save()
        return True

    def write_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Logs the hyperparameters of the run.

        Args:
            hyperparameters: By name.
        """
        self.logger.log_hyperparams(hyperparameters)

    def _begin(self, resumes: bool) -> bool:
        """Whether there may be entries of earlier processes."""
        return False

    def _supersede(self, entry: Entry) -> None: ...

    def _has(self, entry: Entry) -> bool:
        return False


class _Versions(Log):
    """A folder for each run, with a mark where a train logger writes it.

    Lightning's loggers number such folders, and those of a Trainer may be among them.
    """

    logger: CSVLogger | TensorBoardLogger
    _has_earlier = False

    @property
    def _mark(self) -> Path:
        name = f".train_log-{type(self.logger).__name__}-{self._index}"
        return Path(self.logger.log_dir, name)

    def _begin(self, resumes: bool) -> bool:
        # Elsewhere, or where somebody else, such as a Trainer, writes: as Lightning has it.
        if "://" in str(self.logger.save_dir) or internals.is_open(self.logger):
            return False
        if resumes and not internals.has_version(self.logger):
            self._choose_version()
        self._has_earlier = resumes and self._mark.exists()
        self._take_over() if resumes else self._begin_anew()
        # Makes the folder; Lightning warns of one that is not empty, so the mark is last.
        self.logger.save()
        self._mark.touch()
        return resumes

    def _choose_version(self) -> None:
        """The newest that has the mark, else a new one."""
        new = self.logger.version
        assert isinstance(new, int)
        for version in range(new - 1, -1, -1):
            internals.set_version(self.logger, version)
            if self._mark.exists():
                return
        internals.set_version(self.logger, new)

    def _take_over(self) -> None: ...

    def _begin_anew(self) -> None: ...


class _CSVLog(_Versions):
    """Lightning deletes the file of a version that is there: its rows are logged again."""

    logger: CSVLogger

    @property
    def _file(self) -> Path:
        return Path(self.logger.log_dir, ExperimentWriter.NAME_METRICS_FILE)

    @property
    def _aside(self) -> Path:
        """Where the rows are until they are in the new file, for a process may be killed."""
        return self._file.with_suffix(".before")

    def _take_over(self) -> None:
        self._keep(lambda _: True)

    def _begin_anew(self) -> None:
        self._aside.unlink(missing_ok=True)

    def _supersede(self, entry: Entry) -> None:
        if entry.is_test:
            self._keep(lambda row: row["step"] != str(entry.position) or not self._tests(row))
        else:
            start = entry.numbers[entry.name or ""]
            self._keep(lambda row: float(row["step"]) < start)

    def _tests(self, row: Row) -> bool:
        before = internals.name_prefix(self.logger)
        return is_of_test(name.removeprefix(before) for name, value in row.items() if value)

    def _keep(self, is_kept: Callable[[Row], bool]) -> None:
        if self._file.is_file() and not self._aside.is_file():
            self._file.replace(self._aside)
        self._file.unlink(missing_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Experiment logs directory")
            writer = self.logger.experiment
        writer.metrics_keys.clear()
        for row in filter(is_kept, filter(_is_of_numbers, rows_of(self._aside))):
            # As they stand there: a prefix is in their names already, and no digit changes.
            values: Any = {name: value for name, value in row.items() if value}
            writer.log_metrics(values, int(values.pop("step")))
        self.logger.save()
        self._aside.unlink(missing_ok=True)


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
    """TensorBoard leaves out what a later file of events replaces, by its ``purge_step``."""

    logger: TensorBoardLogger

    def write_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Logs them once, for each time adds a number to its curves, ``hp_metric``."""
        if not self._has_earlier:
            super().write_hyperparameters(hyperparameters)

    def _begin_anew(self) -> None:
        if self._mark.exists():
            self._purge(0)

    def _supersede(self, entry: Entry) -> None:
        # A test cannot be left out alone.
        if not entry.is_test:
            self._purge(int(entry.numbers[entry.name or ""]))

    def _purge(self, start: int) -> None:
        # The next entry begins a file.
        self.logger.experiment.close()
        self.logger.experiment.purge_step = start


class _ServiceLog(Log):
    """Nothing can be taken away from a run of W&B or MLflow: what is there is left out."""

    logger: WandbLogger | MLFlowLogger

    def _begin(self, resumes: bool) -> bool:
        # The last number of each name, of earlier processes.
        self._last = self._last_numbers() if resumes else {}
        return resumes

    def write_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Logs them; MLflow refuses another value of one that its run has."""
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
        """Of an epoch before the last one; else equal, for an epoch may have several."""
        numbers, last, name = entry.numbers, self._last, entry.name
        is_repeated = numbers.items() <= last.items()
        if entry.is_test or name is None or name not in last:
            return entry.is_test and is_repeated
        return numbers[name] < last[name] or (numbers[name] == last[name] and is_repeated)


def log_class(logger: Logger) -> type[Log]:
    """The class for what a logger writes.

    Args:
        logger: The logger.
    """
    if isinstance(logger, CSVLogger):
        return _CSVLog
    if isinstance(logger, TensorBoardLogger):
        return _TensorBoardLog
    return _ServiceLog if isinstance(logger, (WandbLogger, MLFlowLogger)) else Log
