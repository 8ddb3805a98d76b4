"""Who acts upon a signal to end, where there are several processes."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from brain_lightning.distributed import termination as module
from brain_lightning.distributed.termination import Termination


def test_a_process_whose_recipe_handles_the_signal_ends_with_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes part in what the others ask of all, which would else wait for it."""
    asked = []

    def on_any_rank(condition: bool, device: str) -> bool:
        asked.append(condition)
        return True

    def handler(*_: Any) -> None: ...

    monkeypatch.setattr(module, "on_any_rank", on_any_rank)
    before = signal.signal(signal.SIGTERM, handler)
    try:
        termination = Termination()
        assert not termination.is_installed
        termination.install(signal.SIGTERM, lambda _: False)
        assert signal.getsignal(signal.SIGTERM) is handler
        assert termination.is_installed
        assert termination.handles_sigterm
        assert termination.requested("cpu") == signal.SIGTERM
        assert asked == [False]
        termination.restore()
        assert signal.getsignal(signal.SIGTERM) is handler
        assert not termination.is_installed
    finally:
        signal.signal(signal.SIGTERM, before)
