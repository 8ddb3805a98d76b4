"""Saves in the background: their content, and when their errors are raised."""

from __future__ import annotations

from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
import torch
from speechbrain.utils.checkpoints import Checkpointer as SpeechBrainCheckpointer
from torch import nn

from brain_lightning import (
    Checkpointer,
    CheckpointSaveError,
    UnsupportedError,
)
from tests.support.brains import Regression, loader, make
from tests.support.processes import check_python
from tests.support.states import State, fails_to_write, saved


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "save"


def test_a_save_in_the_background_holds_what_was_there_when_it_was_asked_for(
    folder: Path,
) -> None:
    state = State(folder, size=8)
    state.checkpointer.async_save = True
    for value in range(5):
        state.set(value)
        checkpoint = state.checkpointer.save_checkpoint({"value": value})
        state.set(99)
    assert checkpoint is not None
    found = state.checkpointer.find_checkpoints()
    assert [each.meta["value"] for each in found] == [4, 3, 2, 1, 0]
    assert found[0] == checkpoint
    for each in found:
        state.checkpointer.load_checkpoint(each)
        assert state.values() == {float(each.meta["value"])}


def test_an_error_in_the_background_surfaces_at_the_next_save(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = saved(folder, 1)
    state.checkpointer.async_save = True
    monkeypatch.setattr(torch, "save", fails_to_write)
    state.checkpointer.save_checkpoint()
    futures.wait([state.checkpointer._pending])
    with pytest.raises(CheckpointSaveError, match="No space left"):
        state.checkpointer.save_checkpoint()


def test_an_error_in_the_background_surfaces_at_the_end_of_a_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SavesLast(Regression):
        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            monkeypatch.setattr(torch, "save", fails_to_write)
            self.checkpointer.save_checkpoint()

    brain = make(SavesLast, checkpointer=Checkpointer(folder), async_save=True)
    assert brain.checkpointer.async_save
    with pytest.raises(CheckpointSaveError, match="No space left"):
        brain.fit(range(1), loader())


def test_a_process_ends_when_its_last_save_is_durable(folder: Path) -> None:
    code = (
        "import torch; from brain_lightning import Checkpointer\n"
        "model = torch.nn.Linear(2000, 500)\n"
        f"checkpointer = Checkpointer({str(folder)!r}, {{'model': model}})\n"
        "checkpointer.async_save = True\n"
        "for value in range(3): checkpointer.save_checkpoint({'value': value})\n"
    )
    check_python("-c", code)
    model = nn.Linear(2000, 500)
    found = Checkpointer(folder, {"model": model}).recover_if_possible()
    assert found is not None
    assert found.meta["value"] == 2


def test_async_save_needs_our_checkpointer(folder: Path) -> None:
    theirs = SpeechBrainCheckpointer(folder)
    with pytest.raises(UnsupportedError, match="async_save needs"):
        make(checkpointer=theirs, async_save=True)
