"""What only a logger knows and writes; the numbers of a step, for whoever asks a Trainer."""

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
    """A logger connector that knows the numbers of a Brain, which need no ``self.log``.

    ``self.log`` would average over batches and processes what is an average already. In each
    step it would cost more than the whole loop of a small model, and at the end of an epoch a
    quarter of a fit of one batch. The loss of a batch costs nothing until somebody reads it.
    """

    brain_run: Run
    # Of the stages that have ended, until what else was logged with them is reset.
    brain_numbers: dict[str, Tensor]

    @property
    def metrics(self) -> Any:
        """What was logged, for callbacks, loggers and bars."""
        found: Any = super().metrics
        for reader, numbers in _by_reader(self.brain_numbers).items():
            found[reader].update(numbers)
        return found

    def log_numbers(self, numbers: Mapping[str, float]) -> None:
        """Logs the numbers of the stages that have ended.

        Args:
            numbers: By name.
        """
        # As self.log.
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.brain_numbers = {n: torch.tensor(v, dtype=dtype) for n, v in numbers.items()}
        # Lightning does not ask for them where nothing else was logged.
        found = _by_reader(self.brain_numbers)
        self._callback_metrics.update(found["callback"])
        self._logged_metrics.update(found["log"])
        self._progress_bar_metrics.update(found["pbar"])

    def reset_results(self) -> None:
        """Forgets what was logged at the end of an epoch or a stage."""
        super().reset_results()
        self.brain_numbers = {}

    @property
    def callback_metrics(self) -> Any:
        """Those that ``ModelCheckpoint`` and ``EarlyStopping`` monitor."""
        self.keep_step_metrics()
        return super().callback_metrics

    @property
    def logged_metrics(self) -> Any:
        """What was given to loggers last."""
        self.keep_step_metrics()
        return super().logged_metrics

    def keep_step_metrics(self) -> None:
        """Stores what is read from now on, also once TRAIN is over."""
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
            # A dictionary for each: some loggers change it.
            logger.log_metrics({**found, "epoch": self.trainer.current_epoch}, step)
            logger.save()


def _by_reader(numbers: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    # A bar has no room for a number by both of its names.
    shown = {name: value.item() for name, value in numbers.items() if is_of_a_stage(name)}
    return {"callback": {**numbers}, "log": {**numbers}, "pbar": shown}


def _logged(numbers: dict[str, Any]) -> dict[str, Any]:
    """Without ``train_loss``, which is that of an epoch in a log."""
    return {name: value for name, value in numbers.items() if name != "train_loss"}


def _connector_of(trainer: Trainer) -> BrainLoggerConnector:
    connector = trainer._logger_connector
    assert isinstance(connector, BrainLoggerConnector)
    return connector


def keep_step_metrics(trainer: Trainer) -> None:
    """Stores the numbers of the last batch, before its stage is over.

    Args:
        trainer: The Trainer of a Brain, in training.
    """
    _connector_of(trainer).keep_step_metrics()


def log_numbers(trainer: Trainer, numbers: Mapping[str, float]) -> None:
    """Logs the numbers of the stages that have ended.

    Args:
        trainer: The Trainer of a Brain, in the hook that ends an epoch.
        numbers: By name; the same in all processes.
    """
    _connector_of(trainer).log_numbers(numbers)


def log_step_metrics(trainer: Trainer) -> None:
    """Logs the numbers of a batch where a LightningModule would.

    Args:
        trainer: The Trainer of a Brain, in ``on_train_batch_end``.
    """
    _connector_of(trainer).log_step_metrics()


def is_open(logger: CSVLogger | TensorBoardLogger) -> bool:
    """Whether a logger has begun to write; to ask it for its ``experiment`` would begin.

    Args:
        logger: The logger.
    """
    return logger._experiment is not None


def has_version(logger: CSVLogger | TensorBoardLogger) -> bool:
    """Whether a logger has its version; to ask it for its ``version`` would choose one.

    Args:
        logger: The logger.
    """
    return logger._version is not None


def set_version(logger: CSVLogger | TensorBoardLogger, version: int) -> None:
    """Chooses the version, which the constructor alone takes otherwise.

    Args:
        logger: A logger that has not begun to write.
        version: The number of its folder.
    """
    logger._version = version


def name_prefix(logger: CSVLogger | WandbLogger | MLFlowLogger) -> str:
    """What a logger puts before each name.

    Args:
        logger: The logger.
    """
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""


def open_with(logger: CSVLogger, writer: ExperimentWriter) -> None:
    """Lets a logger write with this writer, where its own would delete a file.

    Args:
        logger: A logger that has not begun to write.
        writer: Its writer.
    """
    logger._experiment = writer


class WriterParts:
    """What a writer of CSV files does where Lightning's deletes one, or writes it anew."""

    log_dir: str
    _is_used = False

    def delete_earlier(self) -> None:
        """Deletes the file of another run, with Lightning's warning."""
        if self._is_used:
            ExperimentWriter._check_log_dir_exists(self)  # type: ignore[arg-type]

    def rewrite(self, names: Sequence[str]) -> None:
        """Writes the file again, with more columns.

        Args:
            names: Of all columns.
        """

    def _check_log_dir_exists(self) -> None:
        """Looks, when it is made: the file may be of the run that is going to resume."""
        self._is_used = os.path.isdir(self.log_dir) and bool(os.listdir(self.log_dir))

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self.rewrite(fieldnames)
