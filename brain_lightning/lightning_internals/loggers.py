"""Logs the metrics of a Brain, and accesses private attributes of Lightning's loggers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import (
    _LoggerConnector,
)
from torch import Tensor

from brain_lightning.stages.metrics import is_of_a_stage
from brain_lightning.stages.run import Run

from .counters import logged_steps


class BrainLoggerConnector(_LoggerConnector):
    """A logger connector that logs the metrics of a Brain without ``self.log``.

    ``self.log`` would average over batches and ranks, but the Brain's metrics are averages
    already. In each step, ``self.log`` takes longer than the step of a small model. Here the
    loss of a batch costs nothing until it is read.
    """

    brain_run: Run
    # Metrics of the stages that have ended, until the other logged values are reset.
    brain_numbers: dict[str, Tensor]

    @property
    def metrics(self) -> Any:
        """The logged values for callbacks, loggers and progress bars."""
        found: Any = super().metrics
        for reader, numbers in _by_reader(self.brain_numbers).items():
            found[reader].update(numbers)
        return found

    def log_numbers(self, numbers: Mapping[str, float]) -> None:
        """Logs the metrics of the stages that have ended.

        Args:
            numbers: Metrics by name.
        """
        # The same dtype as with self.log.
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.brain_numbers = {n: torch.tensor(v, dtype=dtype) for n, v in numbers.items()}
        # Lightning does not read the property metrics if nothing else was logged.
        found = _by_reader(self.brain_numbers)
        self._callback_metrics.update(found["callback"])
        self._logged_metrics.update(found["log"])
        self._progress_bar_metrics.update(found["pbar"])

    def reset_results(self) -> None:
        """Resets the logged values at the end of an epoch or a stage."""
        super().reset_results()
        self.brain_numbers = {}

    @property
    def callback_metrics(self) -> Any:
        """The metrics that ``ModelCheckpoint`` and ``EarlyStopping`` monitor."""
        self.keep_step_metrics()
        return super().callback_metrics

    @property
    def logged_metrics(self) -> Any:
        """The metrics that were last passed to loggers."""
        self.keep_step_metrics()
        return super().logged_metrics

    def keep_step_metrics(self) -> None:
        """Stores the metrics of the last batch, so that they can be read after TRAIN."""
        numbers = self.brain_run.train.step_metrics()
        self._callback_metrics.update(numbers)
        self._logged_metrics.update(_logged(numbers))

    def log_step_metrics(self) -> None:
        """Logs the loss, every ``log_every_n_steps``."""
        if not self.should_update_logs:
            return
        numbers = _logged(self.brain_run.train.step_metrics())
        self._logged_metrics.update(numbers)
        found = {name: float(value) for name, value in numbers.items()}
        step = logged_steps(self.trainer)
        for logger in self.trainer.loggers if found else ():
            # Each logger gets a new dict, because some loggers change it.
            logger.log_metrics({**found, "epoch": self.trainer.current_epoch}, step)
            logger.save()


def _by_reader(numbers: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    # Progress bars show each metric under only one of its two names.
    shown = {name: value.item() for name, value in numbers.items() if is_of_a_stage(name)}
    return {"callback": {**numbers}, "log": {**numbers}, "pbar": shown}


def _logged(numbers: dict[str, Any]) -> dict[str, Any]:
    """Removes ``train_loss``, which is the loss of an epoch in logs."""
    return {name: value for name, value in numbers.items() if name != "train_loss"}


def _connector_of(trainer: Trainer) -> BrainLoggerConnector:
    connector = trainer._logger_connector
    assert isinstance(connector, BrainLoggerConnector)
    return connector


def keep_step_metrics(trainer: Trainer) -> None:
    """Stores the metrics of the last batch, before its stage ends.

    Args:
        trainer: The Trainer of a Brain, in training.
    """
    _connector_of(trainer).keep_step_metrics()


def log_numbers(trainer: Trainer, numbers: Mapping[str, float]) -> None:
    """Logs the metrics of the stages that have ended.

    Args:
        trainer: The Trainer of a Brain, in the hook that ends an epoch.
        numbers: Metrics by name, identical on all ranks.
    """
    _connector_of(trainer).log_numbers(numbers)


def log_step_metrics(trainer: Trainer) -> None:
    """Logs the metrics of a batch, at the same steps as a LightningModule.

    Args:
        trainer: The Trainer of a Brain, in ``on_train_batch_end``.
    """
    _connector_of(trainer).log_step_metrics()


def is_open(logger: CSVLogger | TensorBoardLogger) -> bool:
    """Whether a logger has started to write. Reading ``logger.experiment`` would start it.

    Args:
        logger: The logger.
    """
    return logger._experiment is not None


def has_version(logger: CSVLogger | TensorBoardLogger) -> bool:
    """Whether a logger has a version. Reading ``logger.version`` would choose one.

    Args:
        logger: The logger.
    """
    return logger._version is not None


def set_version(logger: CSVLogger | TensorBoardLogger, version: int) -> None:
    """Sets the version, which is otherwise only an argument of the constructor.

    Args:
        logger: A logger that has not started to write.
        version: The number of its folder.
    """
    logger._version = version


def name_prefix(logger: CSVLogger | WandbLogger | MLFlowLogger) -> str:
    """Returns the prefix that a logger adds to each name.

    Args:
        logger: The logger.
    """
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""


def open_with(logger: CSVLogger, writer: ExperimentWriter) -> None:
    """Sets the writer of a logger, because Lightning's writer would delete a file.

    Args:
        logger: A logger that has not started to write.
        writer: The writer to use.
    """
    logger._experiment = writer


class WriterParts:
    """Methods of a CSV writer that replace how Lightning's writer deletes and rewrites."""

    log_dir: str
    _is_used = False

    def delete_earlier(self) -> None:
        """Deletes the file of another run, with Lightning's warning."""
        if self._is_used:
            ExperimentWriter._check_log_dir_exists(self)  # type: ignore[arg-type]

    def rewrite(self, names: Sequence[str]) -> None:
        """Writes the file again, with more columns.

        Args:
            names: The names of all columns.
        """

    def _check_log_dir_exists(self) -> None:
        """Checks for an existing file, which may belong to the run that resumes."""
        self._is_used = os.path.isdir(self.log_dir) and bool(os.listdir(self.log_dir))

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self.rewrite(fieldnames)
