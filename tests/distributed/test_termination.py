"""Signals that end a run with several processes."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from brain_lightning import Checkpointer
from brain_lightning.distributed import termination as module
from brain_lightning.distributed.termination import Termination, uninterrupted
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
        assert not termination.handles_sigterm
        termination.install(signal.SIGTERM, lambda _: False)
        assert signal.getsignal(signal.SIGTERM) is handler
        assert termination.handles_sigterm
        assert termination.requested("cpu") == signal.SIGTERM
        assert asked == [False]
        termination.restore()
        assert signal.getsignal(signal.SIGTERM) is handler
        assert not termination.handles_sigterm
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


def test_ctrl_c_is_deferred_until_the_context_ends() -> None:
    before, done = signal.getsignal(signal.SIGINT), []

    def run() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append(signal.getsignal(signal.SIGINT))

    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(done) == 1
    assert done[0] is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_a_thread_that_ctrl_c_does_not_interrupt_installs_no_handler() -> None:
    handlers = []

    def run() -> None:
        with uninterrupted():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]
