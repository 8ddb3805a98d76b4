"""What is logged, shown on the console where nobody has configured logging.

SpeechBrain's loggers let INFO pass, whatever the root logger says, and its recipes show it
through ``create_experiment_directory``. A script that does not call it would see nothing.
"""

from __future__ import annotations

import logging
import os
import sys

from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

# As in SpeechBrain's log-config.yaml.
FORMAT = "%(name)s - %(message)s"
# Of thousands.
UNITS = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


class Console(logging.Handler):
    """Writes between progress bars, as long as the root logger has no handler."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        """Shows on the standard error what nobody else does.

        Args:
            record: What was logged; the first process speaks for all of them.
        """
        first = not getattr(rank_zero_only, "rank", 0)
        if not logging.getLogger().handlers and (first or record.levelno > logging.INFO):
            tqdm.write(self.format(record), file=sys.stderr)


def show_information() -> None:
    """Lets INFO of this package be seen as SpeechBrain's; a second call does nothing.

    ``$SB_LOG_LEVEL`` is SpeechBrain's variable for another level. A level that somebody
    has set stays.
    """
    package = logging.getLogger(__package__)
    if package.level == logging.NOTSET:
        package.setLevel(os.environ.get("SB_LOG_LEVEL", "INFO").upper())
    if not any(isinstance(handler, Console) for handler in package.handlers):
        package.addHandler(Console())


def abbreviated(number: int) -> str:
    """A count as SpeechBrain writes it (``utils.logger.format_order_of_magnitude``).

    Args:
        number: 0 or more.

    Returns:
        ``123.5k`` for 123456.
    """
    power = min((len(str(number)) - 1) // 3, len(UNITS) - 1)
    return f"{number / 1000**power:3.1f}{UNITS[power]}" if power else str(number)
