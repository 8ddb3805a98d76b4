"""Evaluations and epochs count steps from 0, also after a checkpoint was recovered."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import speechbrain
import torch
from speechbrain.utils import checkpoints, epoch_loop
from torch import nn
from torch.utils.data import DataLoader

from brain_lightning import Checkpointer, EpochCounter, patch_speechbrain
from tests.support.brains import Regression, all_equal, loader, make, sgd, weights
from tests.support.resuming import Cut, assert_same

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # SpeechBrain's Checkpointer saves it.
    pytest.mark.filterwarnings("ignore:Trying to load checkpoint from"),
]

BATCHES = 8


class Hooks:
    """Mixin of both Brains: records the steps, and interrupts the run at a given step."""

    modules: Any
    hparams: Any
    checkpointer: Any
    step: int
    avg_train_loss: float
    cut: tuple[str, int, int] | None = None

    def compute_forward(self, batch: Any, stage: Any) -> Any:
        epoch = self.hparams.epoch_counter.current
        self.hparams.steps.append((stage.name, epoch, self.step))
        if (stage.name, epoch, self.step) == self.cut:
            raise Cut
        return self.modules.model(batch[0])

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        return nn.functional.mse_loss(predictions, batch[1])

    def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
        self.hparams.starts.append((stage.name, self.step, self.avg_train_loss))

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        if stage.name == "TRAIN" and "end_of_epoch" in self.hparams.saves:
            self.checkpointer.save_checkpoint(**self.hparams.saves)


class Ours(Hooks, Regression):
    """Brain of brain_lightning."""


class Theirs(Hooks, speechbrain.Brain):
    """Brain of SpeechBrain."""


def hparams(counter: Any, saves: dict[str, Any]) -> dict[str, Any]:
    return {"epoch_counter": counter, "steps": [], "starts": [], "saves": saves}


def ours(folder: Path, saves: dict[str, Any] | None = None, **options: Any) -> Any:
    counter = EpochCounter(2)
    saver = Checkpointer(folder, {"counter": counter})
    options = {"ckpt_interval_minutes": 0, **options}
    brain = make(Ours, hparams=hparams(counter, saves or {}), checkpointer=saver, **options)
    saver.add_recoverable("model", brain.modules.model)
    return brain


def theirs(folder: Path, saves: dict[str, Any] | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    counter, model = epoch_loop.EpochCounter(2), nn.Linear(4, 2)
    saver = checkpoints.Checkpointer(folder, {"counter": counter, "model": model})
    options = {"device": "cpu", "noprogressbar": True, "ckpt_interval_minutes": 0, **options}
    return Theirs({"model": model}, sgd, hparams(counter, saves or {}), options, saver)


def fit(brain: Any, valid: bool = True) -> Any:
    data: DataLoader[Any] = loader(4 * BATCHES)
    brain.fit(brain.hparams.epoch_counter, data, loader() if valid else None)
    return brain


# ------------------------------------------------------------------------------ evaluate


def true_loss(brain: Any) -> torch.Tensor:
    with torch.no_grad():
        losses = [nn.functional.mse_loss(brain.modules.model(x), y) for x, y in loader()]
    return torch.stack(losses).mean()


def assert_evaluates_from_zero(brain: Any, cut_weights: list[torch.Tensor]) -> None:
    found = brain.evaluate(loader())
    assert all_equal(weights(brain), cut_weights)
    assert brain.hparams.starts == [("TEST", 0, pytest.approx(brain.avg_train_loss))]
    assert [step for _, _, step in brain.hparams.steps] == [1, 2, 3, 4, 5]
    torch.testing.assert_close(torch.tensor(float(found)), true_loss(brain))


def test_our_evaluate_of_a_checkpoint_within_an_epoch(tmp_path: Path) -> None:
    first = ours(tmp_path, ckpt_interval_steps=3)
    first.cut = ("TRAIN", 2, 7)
    with pytest.raises(Cut):
        fit(first)
    assert not all_equal(weights(first), weights(ours(tmp_path / "new")))
    assert_evaluates_from_zero(ours(tmp_path), weights(first))


def test_speechbrains_evaluate_when_it_is_patched(tmp_path: Path) -> None:
    first = theirs(tmp_path, ckpt_interval_steps=3)
    first.cut = ("TRAIN", 2, 7)
    with pytest.raises(Cut):
        fit(first)
    plain = theirs(tmp_path)
    wrong = plain.evaluate(loader())
    # SpeechBrain's behaviour: steps continue to count, and the average is wrong.
    assert plain.hparams.steps[0][2] == 7
    with patch_speechbrain():
        assert_evaluates_from_zero(theirs(tmp_path), weights(first))
    assert abs(float(wrong) - float(true_loss(plain))) > 0.1


# ------------------------------------------------- checkpoints of the end of TRAIN resumed


@pytest.mark.parametrize("cut", [("VALID", 1, 2), ("TRAIN", 2, 1), ("TRAIN", 2, 5)], ids=str)
@pytest.mark.parametrize("valid", [True, False], ids=["validated", "not validated"])
@pytest.mark.parametrize("end_of_epoch", [True, False])
def test_saved_in_the_hook_that_ends_training(
    tmp_path: Path, end_of_epoch: bool, valid: bool, cut: tuple[str, int, int]
) -> None:
    if not valid and cut[0] == "VALID":
        pytest.skip("nothing is validated")

    def new(folder: str) -> Any:
        saves = {"end_of_epoch": end_of_epoch}
        return ours(tmp_path / folder, saves, grad_accumulation_factor=3)

    whole = fit(new("whole"), valid)
    first = new("cut")
    first.cut = cut
    with pytest.raises(Cut):
        fit(first, valid)
    resumed = fit(new("cut"), valid)
    # Two full windows of three batches. The incomplete window is dropped.
    assert whole.optimizer_step == 4
    assert_same(whole, resumed)
    steps = [(epoch, step) for stage, epoch, step in resumed.hparams.steps if stage == "TRAIN"]
    assert steps == [(2, step) for step in range(1, BATCHES + 1)]
    assert [s for s in resumed.hparams.starts if s[0] == "TRAIN"][-1] == ("TRAIN", 0, 0.0)
    validated = [
        (epoch, step) for stage, epoch, step in resumed.hparams.steps if stage == "VALID"
    ]
    expected = [(epoch, step) for epoch in (1, 2) for step in range(1, 6)]
    assert validated == (expected if valid else [])


@pytest.mark.parametrize("valid", [True, False], ids=["validated", "not validated"])
def test_speechbrains_own_checkpoint_of_the_end_of_training(
    tmp_path: Path, valid: bool
) -> None:
    saves = {"end_of_epoch": True}
    first = theirs(tmp_path, saves, grad_accumulation_factor=3)
    first.hparams.epoch_counter.limit = 1
    fit(first, valid)
    assert first.optimizer_step == 2
    # SpeechBrain's behaviour: the epoch starts with the counts of the previous one.
    plain = theirs(shutil.copytree(tmp_path, tmp_path / "copy"), grad_accumulation_factor=3)
    assert fit(plain, valid).hparams.steps[0] == ("TRAIN", 2, BATCHES + 1)
    shutil.rmtree(tmp_path / "copy")
    again = theirs(tmp_path, saves, grad_accumulation_factor=3)
    with patch_speechbrain():
        fit(again, valid)
    assert again.hparams.starts[0] == ("TRAIN", 0, 0.0)
    steps = [(epoch, step) for stage, epoch, step in again.hparams.steps if stage == "TRAIN"]
    assert steps == [(2, step) for step in range(1, BATCHES + 1)]
    assert again.optimizer_step == 4
    whole = ours(tmp_path / "whole", grad_accumulation_factor=3)
    assert all_equal(weights(fit(whole, valid)), weights(again))
