"""Shows what this package logs on the console, where nobody has configured logging.

SpeechBrain's loggers pass INFO whatever the level of the root logger is, and its recipes show
it through ``create_experiment_directory``. A script that does not call it would see nothing.
"""

from __future__ import annotations

import logging
import os
import sys
from logging import WARNING

from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from brain_lightning.errors import RunOptionError

# The parent of every file's logger.
PACKAGE = "brain_lightning"
# For powers of a thousand.
UNITS = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


class Console(logging.Handler):
    """Writes between progress bars, as long as the root logger has no handler."""

    def __init__(self) -> None:
        super().__init__()
        # As in SpeechBrain's log-config.yaml.
        self.setFormatter(logging.Formatter("%(name)s - %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Shows on the standard error what no other handler does.

        Args:
            record: What was logged.
        """
        others = [*logging.getLogger().handlers, *logging.getLogger(PACKAGE).handlers]
        if any(not isinstance(handler, Console) for handler in others):
            return
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # noqa: BLE001  as every handler: a line is not worth a training
            self.handleError(record)


def show_information() -> None:
    """Shows this package's INFO as SpeechBrain's is shown; a second call does nothing.

    Other processes than the first show warnings alone, as in SpeechBrain. ``$SB_LOG_LEVEL`` is
    its variable for another level. A level that somebody has set stays.

    Raises:
        RunOptionError: The variable names no level.
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
        raise RunOptionError(f"SB_LOG_LEVEL={name} is not one of DEBUG, INFO, WARNING, ERROR")
    return level


def abbreviated(number: int) -> str:
    """A count as SpeechBrain writes it (``utils.logger.format_order_of_magnitude``).

    Args:
        number: A whole number, 0 or more.

    Returns:
        ``123.5k`` for 123456.
    """
    power = min((len(str(number)) - 1) // 3, len(UNITS) - 1)
    return f"{number / 1000**power:3.1f}{UNITS[power]}" if power else str(number)
