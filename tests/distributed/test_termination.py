"""Signals that end a run with several processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from brain_lightning import Checkpointer
from brain_lightning.distributed import termination as module
from brain_lightning.distributed.termination import Termination
from tests.support.brains import Regression, loader, make


def test_a_process_whose_recipe_handles_the_signal_ends_with_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes part in the collective. Otherwise the other processes would hang."""
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


class Terminated(Regression):
    """Receives SIGTERM after the last batch."""

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_after_the_last_batch_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flags of the last batch were exchanged before the signal."""
    raised: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    brain = make(Terminated, checkpointer=Checkpointer(tmp_path))
    with pytest.raises(SystemExit):
        brain.fit(range(1), loader())
    assert raised == []
    assert list(tmp_path.glob("CKPT*"))
