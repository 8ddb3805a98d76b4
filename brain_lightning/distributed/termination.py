"""Signals that end a run. They are recorded, and handled between two batches."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .communication import on_any_rank

# Exit status that a shell reports for a process that SIGTERM ended.
EXIT_STATUS = 128 + signal.SIGTERM


class Termination:
    """Handles SIGTERM during a run, and the signal by which a scheduler requeues its job.

    Signals are recorded. A second SIGTERM ends the process, unless the run is already ending.
    """

    def __init__(self) -> None:
        self._received: set[int] = set()
        self._previous: dict[int, Any] = {}
        # The same on all ranks, even if the recipe handles a signal itself on one rank.
        self._signals: list[int] = []
        self._process = 0
        self._is_ending = False

    def install(self, signum: int, is_free: Callable[[Any], bool]) -> None:
        """Installs the handler of a signal, unless the recipe has a handler.

        Args:
            signum: The signal. If several are received, the one installed first counts.
            is_free: Returns whether a handler may be replaced.
        """
        self._signals.append(signum)
        is_main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signum)
        if is_main and (handler is signal.SIG_DFL or is_free(handler)):
            self._previous[signum], self._process = handler, os.getpid()
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, _: Any) -> None:
        # A process that a hook or a loader forked has nothing to save.
        is_alone = os.getpid() != self._process
        is_second = signum in self._received and not self._is_ending
        if signum == signal.SIGTERM and (is_alone or is_second):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        self._received.add(signum)

    @property
    def handles_sigterm(self) -> bool:
        """Whether SIGTERM to one rank is handled by all ranks or by the recipe."""
        return signal.SIGTERM in self._signals

    @property
    def is_requested(self) -> bool:
        """Whether this rank received one of the signals and has not handled it yet."""
        return bool(self._received)

    def requested(self, device: str) -> int | None:
        """Returns the signal to handle if any rank ``is_requested``. The same on all ranks.

        Args:
            device: Device that the process group communicates from.
        """
        found = (
            signum for signum in self._signals if on_any_rank(signum in self._received, device)
        )
        return next(found, None)

    def forget(self, signum: int) -> None:
        """Records that a signal was handled and that the run continues.

        Args:
            signum: The signal.
        """
        self._received.discard(signum)

    def acknowledge(self) -> None:
        """Records that the run has saved its state and is about to end."""
        self._received.clear()
        self._is_ending = True

    def restore(self) -> None:
        """Restores the previous handlers. Raises a SIGTERM again if it was not handled."""
        for signum, handler in self._previous.items():
            if signal.getsignal(signum) == self._handle:
                signal.signal(signum, handler)
        is_open = signal.SIGTERM in self._received
        self._previous.clear()
        self._signals.clear()
        if is_open and not self._is_ending:
            signal.raise_signal(signal.SIGTERM)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Defers Ctrl-C (SIGINT) until the end of the context, and raises it then."""
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        # The previous handler was not set from Python and could not be restored, or Ctrl-C
        # does not interrupt this thread.
        yield
        return
    received: list[int] = []
    signal.signal(signal.SIGINT, lambda signum, _: received.append(signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if received:
            signal.raise_signal(signal.SIGINT)
