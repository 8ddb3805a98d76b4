"""Shows this package's log messages on the console if logging is not configured.

SpeechBrain's loggers have the level INFO, independent of the root logger. Its recipes show
these messages because ``create_experiment_directory`` configures logging. A script that does
not call this function would show no messages.
"""

from __future__ import annotations

import logging
import os
import sys
from logging import WARNING

from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from brain_lightning.errors import RunOptionError

# Name of the parent of all loggers of this package.
PACKAGE = "brain_lightning"
# Suffixes for powers of 1000.
UNITS = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


class Console(logging.Handler):
    """Writes messages above progress bars, while there is no other logging handler."""

    def __init__(self) -> None:
        super().__init__()
        # The same format as in SpeechBrain's log-config.yaml.
        self.setFormatter(logging.Formatter("%(name)s - %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record to the standard error if no other handler shows it.

        Args:
            record: The log record.
        """
        others = [*logging.getLogger().handlers, *logging.getLogger(PACKAGE).handlers]
        if any(not isinstance(handler, Console) for handler in others):
            return
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # noqa: BLE001  as in other handlers: logging must not end a training
            self.handleError(record)


def show_information() -> None:
    """Shows INFO messages of this package, as SpeechBrain shows its own.

    A second call does nothing. Ranks other than 0 show only warnings, as in SpeechBrain. The
    environment variable ``SB_LOG_LEVEL`` sets another level, also as in SpeechBrain. If a
    level is set already, it is not changed.

    Raises:
        RunOptionError: The value of the variable is not a level.
    """
    package = logging.getLogger(PACKAGE)
    if package.level == logging.NOTSET:
        package.setLevel(_level() if not getattr(rank_zero_only, "rank", 0) else WARNING)
    if not any(isinstance(handler, Console) for handler in package.handlers):
        package.addHandler(Console())


def _level() -> int:
    name = os.environ.get("SB_LOG_LEVEL") or "INFO"
    level = int(name) if name.isdecimal() else logging.getLevelName(name.upper())
    if not isinstance(level, int):
        raise RunOptionError(
            f"SB_LOG_LEVEL={name} is not a log level. Use DEBUG, INFO, WARNING or ERROR."
        )
    return level


def abbreviated(number: int) -> str:
    """Formats a count as SpeechBrain does (``utils.logger.format_order_of_magnitude``).

    Args:
        number: An integer of 0 or more.

    Returns:
        A string such as ``123.5k`` for 123456.
    """
    power = min((len(str(number)) - 1) // 3, len(UNITS) - 1)
    return f"{number / 1000**power:3.1f}{UNITS[power]}" if power else str(number)
