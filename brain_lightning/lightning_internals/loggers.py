"""Whether a version was asked for, and whether anything was written: only a logger knows."""

from __future__ import annotations

from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger


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
