"""The Checkpointer: SpeechBrain's API and files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from speechbrain.utils.checkpoints import Checkpointer as SpeechBrainCheckpointer
from torch import nn

from brain_lightning import (
    Checkpointer,
    CheckpointError,
    EpochCounter,
    average_checkpoints,
)
from tests.support.brains import Regression, loader, make, weights
from tests.support.processes import check_python
from tests.support.states import saved

GOLDEN = Path(__file__).parents[1] / "support" / "golden"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "save"


# --------------------------------------------------------------------- SpeechBrain's files


def test_a_checkpoint_of_real_speechbrain_is_read() -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text())
    brain, counter = make(opt_class=lambda p: torch.optim.Adam(p, 0.01)), EpochCounter(9)
    brain.init_optimizers()
    recoverables = {
        "model": brain.modules.model, "counter": counter, "brain": brain,
        "optimizer": brain.optimizer,
    }  # fmt: skip
    checkpointer = Checkpointer(GOLDEN / "save", recoverables, allow_partial_load=True)
    found = checkpointer.recover_if_possible(min_key="WER")
    assert found is not None
    assert found.meta["WER"] == expected["WER"]
    assert brain.modules.model.weight.tolist() == expected["weight"]
    first, *_ = brain.optimizer.state_dict()["state"].values()
    assert first["exp_avg"].tolist() == expected["exp_avg"]
    assert (counter.current, brain.optimizer_step) == (
        expected["epoch"], expected["optimizer_step"],
    )  # fmt: skip


def test_it_is_read_without_speechbrain() -> None:
    code = (
        "import sys; sys.modules['speechbrain'] = None\n"
        "import torch; from brain_lightning import Checkpointer\n"
        "model = torch.nn.Linear(4, 2)\n"
        f"Checkpointer({str(GOLDEN / 'save')!r}, {{'model': model}}).recover_if_possible()\n"
        "print(model.bias.tolist())"
    )
    # A new process, because a fork has already imported SpeechBrain.
    found = check_python("-c", code, real=True)
    expected = json.loads((GOLDEN / "expected.json").read_text())
    assert json.loads(found) == expected["bias"]


def test_speechbrain_reads_ours(folder: Path) -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.1, 1.0, cycle_momentum=False)
    objects = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    meta = {"WER": torch.tensor(3.5), "history": [1, 2]}
    Checkpointer(folder, objects).save_checkpoint(meta)
    other = nn.Linear(3, 3)
    other_optimizer = torch.optim.Adam(other.parameters())
    schedule = torch.optim.lr_scheduler.CyclicLR(
        other_optimizer, 0.1, 1.0, cycle_momentum=False
    )
    theirs = SpeechBrainCheckpointer(
        folder, {"model": other, "optimizer": other_optimizer, "scheduler": schedule}
    )
    found = theirs.recover_if_possible(min_key="WER")
    assert found.meta["WER"] == 3.5
    assert torch.equal(other.weight, model.weight)
    assert str(other_optimizer.state_dict()) == str(optimizer.state_dict())
    theirs.save_and_keep_only({"WER": 1.0})
    assert len(Checkpointer(folder, objects).list_checkpoints()) == 1


def test_a_brain_trains_with_ours_as_with_speechbrains(tmp_path: Path) -> None:
    class Saves(Regression):
        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            if stage.name == "VALID":
                self.checkpointer.save_and_keep_only({"loss": stage_loss}, min_keys=["loss"])

    results = []
    for cls in (Checkpointer, SpeechBrainCheckpointer):
        for _ in range(2):
            counter = EpochCounter(3)
            checkpointer = cls(tmp_path / cls.__module__, {"counter": counter})
            brain = make(Saves, checkpointer=checkpointer, hparams={"counter": counter})
            checkpointer.add_recoverable("model", brain.modules.model)
            brain.fit(counter, loader(), loader())
            results.append((brain.evaluate(loader(), min_key="loss"), brain.optimizer_step))
    assert results[0] == results[1] == results[2] == results[3]
    assert results[0][1] == 15


# --------------------------------------------------------------------- finding and loading


def test_a_recoverable_that_is_not_in_the_checkpoint(folder: Path) -> None:
    state = saved(folder, 1)
    state.checkpointer.add_recoverable("other", nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match=r"no file for 'other'.*allow_partial"):
        state.checkpointer.recover_if_possible()
    state.checkpointer.add_recoverable("other", nn.Linear(1, 1), optional_load=True)
    with pytest.warns(UserWarning, match="no file for 'other'. The object is not loaded"):
        assert state.checkpointer.recover_if_possible() is not None


def test_an_object_without_hooks_is_told_before_anything_is_written(folder: Path) -> None:
    checkpointer = Checkpointer(folder, {"thing": object()})
    with pytest.raises(CheckpointError, match="'thing', a object, has no hook to save it"):
        checkpointer.save_checkpoint()
    assert not list(folder.iterdir())


def test_keys_exclude_each_other(folder: Path) -> None:
    with pytest.raises(ValueError, match="max_key='a' and min_key='b' exclude each other"):
        Checkpointer(folder).find_checkpoint(max_key="a", min_key="b")


def test_anything_with_a_state_dict_is_saved(folder: Path) -> None:
    class Thing:
        value = 1

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.value = state["value"]

    thing = Thing()
    thing.value = 5
    checkpointer = Checkpointer(folder, {"thing": thing})
    checkpointer.save_checkpoint()
    thing.value = 7
    checkpointer.recover_if_possible()
    assert thing.value == 5


def test_checkpoints_are_averaged(folder: Path) -> None:
    state = saved(folder, 1, 2, 6)
    found = state.checkpointer.find_checkpoints(max_num_checkpoints=2)
    assert average_checkpoints(found, "model")["weight"].unique().tolist() == [4.0]


def test_weights_move_where_a_run_is_resumed(folder: Path) -> None:
    first = make(checkpointer=Checkpointer(folder))
    first.checkpointer.add_recoverable("model", first.modules.model)
    first.fit(range(2), loader())
    first.checkpointer.save_checkpoint()
    second = make(checkpointer=Checkpointer(folder))
    second.checkpointer.add_recoverable("model", second.modules.model)
    before = weights(second)
    second.on_fit_start()
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))
    assert not torch.equal(before[0], weights(second)[0])
    assert second.optimizer_step == 10


def test_what_is_done_is_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        state = saved(folder, 1)
        state.checkpointer.recover_if_possible()
    assert f"Saved an end-of-epoch checkpoint in {folder / 'CKPT+1'}" in caplog.text
    assert f"Loading a checkpoint from {folder / 'CKPT+1'}" in caplog.text
