"""Differences between versions of others."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


def add_note(error: BaseException, note: str) -> None:
    """Adds a line to what a traceback shows of an error.

    Args:
        error: The error; its type, its arguments and ``str(error)`` stay as they are.
        note: The line. Python 3.10 knows no notes: there it is logged, and kept where
            later versions keep them.
    """
    if hasattr(error, "add_note"):
        error.add_note(note)
        return
    vars(error).setdefault("__notes__", []).append(note)
    logger.error("%s: %s", type(error).__name__, note)


def notes(error: BaseException) -> list[str]:
    """The lines that were added to an error.

    Args:
        error: Any error.
    """
    return list(getattr(error, "__notes__", ()))
