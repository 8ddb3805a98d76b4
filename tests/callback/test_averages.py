"""Averages of weights in a recipe's checkpoints: validated, saved, tested and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import speechbrain.utils.checkpoints as speechbrains
import torch
from lightning.pytorch import callbacks

from brain_lightning import Checkpointer, EpochCounter
from tests.support.brains import Regression, all_equal, loader, make, weights
from tests.support.upstream import needs_lightning

pytestmark = [needs_lightning("2.6"), pytest.mark.filterwarnings("ignore::UserWarning")]


class Saving(Regression):
    """Saves the best validation, as recipes do."""

    cut = -1

    def on_fit_batch_end(self, *_: Any) -> None:
        if self.optimizer_step == self.cut:
            raise ConnectionError("power cut")

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        super().on_stage_end(stage, stage_loss, epoch)
        if stage.name == "VALID":
            self.losses = {**getattr(self, "losses", {}), epoch: stage_loss}
            self.checkpointer.save_and_keep_only({"loss": stage_loss}, min_keys=["loss"])


def brain_in(folder: Path, checkpointer: Any, cut: int = -1, **options: Any) -> Any:
    counter = EpochCounter(4)
    brain = make(
        Saving, lambda p: torch.optim.SGD(p, 0.3), {"epoch_counter": counter}, **options
    )
    brain.checkpointer = checkpointer(
        folder, {"model": brain.modules.model, "counter": counter}
    )
    brain.cut = cut
    return brain


def fit(brain: Any, *given: Any) -> Any:
    trainer = {"callbacks": list(given) or [callbacks.EMAWeightAveraging(decay=0.9)]}
    brain.fit(brain.hparams.epoch_counter, loader(), loader(), trainer=trainer)
    return brain


@pytest.mark.parametrize("interval", [0, 3])
@pytest.mark.parametrize("checkpointer", [Checkpointer, speechbrains.Checkpointer])
def test_what_was_measured_is_saved_and_training_goes_on_with_the_weights(
    tmp_path: Path, checkpointer: Any, interval: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The run is killed after a save within an epoch, or at the end of an epoch."""
    options = {"ckpt_interval_steps": interval}
    whole = fit(brain_in(tmp_path / "whole", checkpointer, **options))
    with pytest.raises(ConnectionError):
        fit(brain_in(tmp_path / "cut", checkpointer, 14, **options))
    resumed = fit(brain_in(tmp_path / "cut", checkpointer, **options))
    assert all_equal(weights(whole), weights(resumed))
    assert resumed.losses == {epoch: whole.losses[epoch] for epoch in resumed.losses}
    assert len(resumed.losses) == 2
    best = min(whole.losses.values())
    for folder in ("whole", "cut"):
        tested = brain_in(tmp_path / folder, checkpointer)
        assert tested.evaluate(loader(), min_key="loss") == best
    assert "do not contain the full state" not in caplog.text


def test_a_checkpoint_without_an_average_begins_one_with_its_weights(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        fit(brain_in(tmp_path, Checkpointer, 6), callbacks.LambdaCallback())
    (saved,) = (torch.load(path, weights_only=True) for path in tmp_path.glob("*/model.ckpt"))
    averaging = callbacks.EMAWeightAveraging(decay=0.9, update_starting_at_step=999)
    # VALID evaluates the average, which is also the final result of training.
    resumed = fit(brain_in(tmp_path, Checkpointer), averaging)
    assert len(set(resumed.losses.values())) == 1
    assert torch.equal(resumed.modules.model.weight, saved["weight"])
