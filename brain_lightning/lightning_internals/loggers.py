"""What only a logger knows: its version, whether it has begun to write, and with what."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


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
