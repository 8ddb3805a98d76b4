"""The stages of one run."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from brain_lightning.resume.run_state import RunState
from brain_lightning.stages.epochs import Epochs
from brain_lightning.stages.run import Run
from tests.support.brains import make


class Silent:
    """A ``TrainerSide`` without state."""

    shows_bar = validates = saves = saves_after_fetch = saves_within_batch = False

    def state(self) -> dict[str, Any]:
        return {}

    def weights(self) -> Any:
        return contextlib.nullcontext()

    def correct(self, checkpoint: dict[str, Any]) -> None:
        pass

    def state_beside_weights(self) -> dict[str, Any]:
        return {}

    def save_within_epoch(self) -> None:
        pass

    def may_call_end_hooks(self) -> bool:
        return False


def test_whether_a_validation_is_sharded_is_decided_when_it_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for file in ("evaluation", "sharded_evaluation"):
        monkeypatch.setattr(f"brain_lightning.stages.{file}.world_size", lambda: 2)
    brain = make(shard_eval=True)
    run = Run(brain, Epochs(range(1)), RunState(brain))
    run.begin(Silent())
    (loader,) = run.valid.wrap([[1, 2, 3]])
    loader.start()
    # A recipe may set this in on_stage_start.
    brain.shard_eval = False
    assert list(loader) == [1, 2, 3]
    loader.start()
    brain.shard_eval = True
    assert list(loader) == [1, 3]
    run.close()
