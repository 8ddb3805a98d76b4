"""Named checkpoint directories: ``evaluate(ckpt=...)`` and a Trainer's ``ckpt_path``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import speechbrain.utils.checkpoints as speechbrains
import torch
from torch import nn

from brain_lightning import (
    Checkpointer,
    EpochCounter,
    NoSuchCheckpointError,
    average_checkpoints,
    to_lightning,
)
from tests.support.brains import Regression, all_equal, loader, make, trainer_with, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Saving(Regression):
    """Saves a checkpoint with the number and the loss of each epoch."""

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        super().on_stage_end(stage, stage_loss, epoch)
        if stage.name == "VALID" and epoch is not None:
            self.losses = {**getattr(self, "losses", {}), epoch: stage_loss}
            self.checkpointer.save_checkpoint({"loss": stage_loss}, name=f"e{epoch}")


class Averaging(Saving):
    """Recovers the average of all checkpoints that it finds, as many recipes do."""

    def on_evaluate_start(self, max_key: Any = None, min_key: Any = None) -> None:
        found = self.checkpointer.find_checkpoints(max_key=max_key, min_key=min_key)
        self.modules.model.load_state_dict(average_checkpoints(found, "model"))


class Plainly(Saving):
    """Overrides the hooks that recover, and recovers nothing."""

    def on_evaluate_start(self, max_key: Any = None, min_key: Any = None) -> None:
        pass


def brain_in(folder: Path, cls: Any = Saving, checkpointer: Any = Checkpointer) -> Any:
    brain = make(cls, hparams={"epoch_counter": EpochCounter(3)})
    saved = {"model": brain.modules.model, "counter": brain.hparams.epoch_counter}
    brain.checkpointer = checkpointer(folder, saved)
    return brain


def trained(folder: Path, cls: Any = Saving, checkpointer: Any = Checkpointer) -> Any:
    brain = brain_in(folder, cls, checkpointer)
    brain.fit(brain.hparams.epoch_counter, loader(), loader())
    return brain


CHECKPOINTERS = [Checkpointer, speechbrains.Checkpointer]


@pytest.mark.parametrize("checkpointer", CHECKPOINTERS)
@pytest.mark.parametrize("cls", [Saving, Averaging, Plainly])
def test_evaluate_recovers_what_is_named(
    tmp_path: Path, cls: Any, checkpointer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    brain = trained(tmp_path / "save", cls, checkpointer)
    losses = brain.losses
    assert len(set(losses.values())) == 3
    monkeypatch.chdir(tmp_path)
    for ckpt in ("e1", "CKPT+e1", Path("save") / "CKPT+e1"):
        other = brain_in(tmp_path / "save", cls, checkpointer)
        assert other.evaluate(loader(), ckpt=ckpt) == losses[1]
    # A path to a checkpoint of another Brain.
    elsewhere = brain_in(tmp_path / "other", cls, checkpointer)
    assert elsewhere.evaluate(loader(), ckpt=tmp_path / "save" / "CKPT+e2") == losses[2]
    # The modules are not changed, and have the weights of e2.
    assert elsewhere.evaluate(loader(), ckpt=None) == losses[2]
    with torch.no_grad():
        brain.modules.model.weight.zero_()
    assert brain.evaluate(loader(), ckpt=None) not in losses.values()
    if cls is Saving:
        assert brain.evaluate(loader(), min_key="loss") == min(losses.values())
        assert brain.evaluate(loader()) == losses[3]


def test_a_trainers_ckpt_path_may_be_a_directory(tmp_path: Path) -> None:
    whole = trained(tmp_path)
    trainer = trainer_with()
    tested = brain_in(tmp_path)
    (metrics,) = trainer.test(to_lightning(tested), loader(), ckpt_path="CKPT+e1")
    assert metrics["test_loss"] == pytest.approx(whole.losses[1])
    path = tmp_path / "CKPT+e2"
    (metrics,) = trainer.validate(to_lightning(brain_in(tmp_path)), loader(), ckpt_path=path)
    assert metrics["valid_loss"] == pytest.approx(whole.losses[2])
    predicted = trainer.predict(to_lightning(brain_in(tmp_path)), loader(), ckpt_path=path)
    # This applies to one run. The next run recovers the newest checkpoint.
    (metrics,) = trainer.test(to_lightning(tested), loader())
    assert metrics["test_loss"] == pytest.approx(whole.losses[3])
    second = nn.Linear(4, 2)
    second.load_state_dict(torch.load(path / "model.ckpt", weights_only=True))
    assert torch.equal(predicted[0], second(next(iter(loader()))[0]))


def test_fit_goes_on_from_the_checkpoint_that_is_named(tmp_path: Path) -> None:
    whole = trained(tmp_path)
    again = brain_in(tmp_path)
    trainer_with(max_epochs=-1).fit(
        to_lightning(again), loader(), loader(), ckpt_path=str(tmp_path / "CKPT+e1")
    )
    assert again.events[0] == ("start", "TRAIN", 2)
    assert again.losses == {epoch: whole.losses[epoch] for epoch in (2, 3)}
    assert all_equal(weights(whole), weights(again))


def test_what_is_not_there_is_refused_with_the_choices(tmp_path: Path) -> None:
    brain = trained(tmp_path)
    choices = r"Available checkpoints, the newest first: CKPT\+e3, CKPT\+e2, CKPT\+e1"
    with pytest.raises(NoSuchCheckpointError, match=choices):
        brain.evaluate(loader(), ckpt="e4")
    with pytest.raises(NoSuchCheckpointError, match=choices):
        trainer_with().test(to_lightning(brain), loader(), ckpt_path=tmp_path / "CKPT+e4")
    with pytest.raises(NoSuchCheckpointError, match="Pass only one of ckpt"):
        brain.evaluate(loader(), min_key="loss", ckpt=None)
    with pytest.raises(NoSuchCheckpointError, match=r"no Checkpointer.*Pass a Checkpointer"):
        make().evaluate(loader(), ckpt="e1")
