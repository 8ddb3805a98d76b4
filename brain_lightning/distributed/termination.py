"""Signals that end a run: recorded, and acted upon between two batches."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from .communication import on_any_rank

# The exit status that a shell reports for a process that SIGTERM has ended.
EXIT_STATUS = 128 + signal.SIGTERM


class Termination:
    """Handles SIGTERM during a run, and the signal that a scheduler requeues its job by.

    They are recorded. A second SIGTERM ends the process, unless the run is ending already.
    """

    def __init__(self) -> None:
        self._received: set[int] = set()
        self._previous: dict[int, Any] = {}
        # The same in all processes, also where the recipe of one handles a signal itself.
        self._signals: list[int] = []
        self._process = 0
        self._is_ending = False

    def install(self, signum: int, is_free: Callable[[Any], bool]) -> None:
        """Handles a signal, unless the recipe does.

        Args:
            signum: The signal; of several that were received, the first installed counts.
            is_free: Whether a handler may be replaced.
        """
        self._signals.append(signum)
        is_main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signum)
        if is_main and (handler is signal.SIG_DFL or is_free(handler)):
            self._previous[signum], self._process = handler, os.getpid()
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, _: Any) -> None:
        # A process that a hook or a loader has forked has nothing to save.
        is_alone = os.getpid() != self._process
        is_second = signum in self._received and not self._is_ending
        if signum == signal.SIGTERM and (is_alone or is_second):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        self._received.add(signum)

    @property
    def handles_sigterm(self) -> bool:
        """Whether a SIGTERM to one of the processes is handled by all, or by the recipe."""
        return signal.SIGTERM in self._signals

    @property
    def is_installed(self) -> bool:
        """Whether the processes ask each other for a signal."""
        return bool(self._signals)

    @property
    def is_requested(self) -> bool:
        """Whether this process received one of the signals, and has not acted upon it."""
        return bool(self._received)

    def requested(self, device: str) -> int | None:
        """The signal to act upon, where a process ``is_requested``; the same in all of them.

        Args:
            device: The device that processes communicate from.
        """
        found = (
            signum for signum in self._signals if on_any_rank(signum in self._received, device)
        )
        return next(found, None)

    def forget(self, signum: int) -> None:
        """Records that a signal was acted upon, and that the run goes on.

        Args:
            signum: The signal.
        """
        self._received.discard(signum)

    def acknowledge(self) -> None:
        """Records that the run has saved its state, and is about to end."""
        self._received.clear()
        self._is_ending = True

    def restore(self) -> None:
        """Restores the previous handlers; a SIGTERM that nothing came of is raised now."""
        for signum, handler in self._previous.items():
            if signal.getsignal(signum) == self._handle:
                signal.signal(signum, handler)
        is_open = signal.SIGTERM in self._received
        self._previous.clear()
        self._signals.clear()
        if is_open and not self._is_ending:
            signal.raise_signal(signal.SIGTERM)
