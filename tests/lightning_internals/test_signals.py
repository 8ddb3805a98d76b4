"""Signals with the Trainer of ``brain.fit``: no handler of Lightning's, at no time."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.brains import Regression, loader, make


def test_lightning_handles_no_signal_before_training_starts() -> None:
    found = []

    def epochs() -> Iterator[int]:
        # Lightning has registered its handlers, and called no hook since.
        found.append(signal.getsignal(signal.SIGTERM))
        yield 1

    make().fit(epochs(), loader())
    assert found == [signal.SIG_DFL]


@pytest.mark.parametrize("hook", ["on_stage_start", "on_stage_end"])
def test_a_handler_that_a_hook_registers_stays(hook: str) -> None:
    """As with SpeechBrain; Lightning would restore what there was before training."""

    def handler(*_: Any) -> None:
        """Nothing: that it is there is enough."""

    def register(self: Any, *_: Any) -> None:
        signal.signal(signal.SIGUSR2, handler)

    brain = make(type("Registers", (Regression,), {hook: register}))
    before = signal.getsignal(signal.SIGUSR2)
    try:
        brain.fit(range(1), loader())
        assert signal.getsignal(signal.SIGUSR2) is handler
    finally:
        signal.signal(signal.SIGUSR2, before)
