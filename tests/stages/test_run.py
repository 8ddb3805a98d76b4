"""The stages of one run."""

from __future__ import annotations

import pytest

from brain_lightning.resume.run_state import RunState
from brain_lightning.stages.epochs import Epochs
from brain_lightning.stages.run import Run
from tests.support.brains import make


def test_whether_a_validation_is_sharded_is_decided_when_it_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for file in ("evaluation", "sharded_evaluation"):
        monkeypatch.setattr(f"brain_lightning.stages.{file}.world_size", lambda: 2)
    brain = make(shard_eval=True)
    (loader,) = Run(brain, Epochs(range(1)), RunState(brain)).valid.wrap([[1, 2, 3]])
    loader.start()
    # As a recipe may say in on_stage_start.
    brain.shard_eval = False
    assert list(loader) == [1, 2, 3]
    loader.start()
    brain.shard_eval = True
    assert list(loader) == [1, 3]
