"""SIGTERM during training: recorded, and acted upon between two batches."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from .communication import on_any_rank

# The exit status that a shell reports for a process that a signal has ended.
EXIT_STATUS = 128 + signal.SIGTERM


class Termination:
    """Handles SIGTERM during a run: the first is recorded, a second ends the process."""

    def __init__(self) -> None:
        self._received = False
        self._process = 0
        self._previous: Any = None

    def install(self, is_free: Callable[[Any], bool]) -> None:
        """Installs the handler, unless the recipe has one.

        Args:
            is_free: Whether a handler may be replaced.
        """
        is_main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGTERM)
        if is_main and (handler is signal.SIG_DFL or is_free(handler)):
            self._previous, self._process = handler, os.getpid()
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, *_: Any) -> None:
        # A process that a hook has forked has nothing to save.
        if self._received or os.getpid() != self._process:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        self._received = True

    @property
    def is_installed(self) -> bool:
        """Whether SIGTERM is handled here."""
        return self._previous is not None

    def is_requested(self, device: str) -> bool:
        """Whether any process has received SIGTERM.

        Args:
            device: The device that processes communicate from.
        """
        return self.is_installed and on_any_rank(self._received, device)

    def acknowledge(self) -> None:
        """Records that the run has saved its state, and is about to end."""
        self._received = False

    def restore(self) -> None:
        """Restores the previous handler; a signal that was not acknowledged is raised now."""
        if self._previous is None:
            return
        if signal.getsignal(signal.SIGTERM) == self._handle:
            signal.signal(signal.SIGTERM, self._previous)
        self._previous = None
        if self._received:
            signal.raise_signal(signal.SIGTERM)
