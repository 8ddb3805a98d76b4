"""SIGTERM in the middle of training: heard, and obeyed where nothing is lost."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from .communication import on_any_rank

# What a shell says of a process that a signal has ended.
EXIT_STATUS = 128 + signal.SIGTERM


class Termination:
    """Hears SIGTERM for the time of a run; a second one ends the process at once."""

    def __init__(self) -> None:
        self._heard = False
        self._process = 0
        self._handler: Any = None

    def listen(self, is_free: Callable[[Any], bool]) -> None:
        """Begins to listen, unless the recipe does so itself.

        Args:
            is_free: Whether a handler may be replaced.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        handler = signal.getsignal(signal.SIGTERM)
        if handler is signal.SIG_DFL or is_free(handler):
            self._handler, self._process = handler, os.getpid()
            signal.signal(signal.SIGTERM, self._hear)

    def _hear(self, *_: Any) -> None:
        # A process that a hook has forked has nothing to save.
        if self._heard or os.getpid() != self._process:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        self._heard = True

    @property
    def listens(self) -> bool:
        """Whether a SIGTERM is heard here."""
        return self._handler is not None

    def is_requested(self, device: str) -> bool:
        """Whether any process was told to end.

        Args:
            device: The device that processes communicate from.
        """
        return self.listens and on_any_rank(self._heard, device)

    def obeyed(self) -> None:
        """Takes note that what was heard has been done."""
        self._heard = False

    def restore(self) -> None:
        """Stops listening; what was heard and not obeyed ends the process now."""
        if self._handler is None:
            return
        if signal.getsignal(signal.SIGTERM) == self._hear:
            signal.signal(signal.SIGTERM, self._handler)
        self._handler = None
        if self._heard:
            signal.raise_signal(signal.SIGTERM)
