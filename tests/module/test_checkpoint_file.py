"""``trainer.fit(ckpt_path=...)``: exact resume from Lightning's checkpoints of a Brain."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from brain_lightning import CheckpointError, to_lightning
from brain_lightning.cli.main import main
from tests.support.brains import Regression, loader, make, trainer_with, weights
from tests.support.resuming import (
    BATCHES,
    Callbacks,
    Cut,
    Noisy,
    assert_same,
    at,
    brain_in,
    seed,
    whole_and_resumed,
)
from tests.support.resuming import fit_with_trainer as fit
from tests.support.resuming import shuffled_by_workers as train_set

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*does not have many workers",
        "Checkpoint directory .* exists and is not empty",
        "(?s)Using ModelCheckpoint with manual optimization",
        r".*there is no last checkpoint available",
        r".*fit\(ckpt_path=None\)` was called without a model",
    )
]


class SavesAfter(Callback):
    """Calls ``trainer.save_checkpoint`` after one batch, as a user's callback may."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batch:
            trainer.save_checkpoint(self.path)


class ByHand(Noisy):
    """Makes two updates per batch in an overridden ``fit_batch``."""

    def fit_batch(self, batch: Any) -> Any:
        for _ in range(2):
            predictions = self.compute_forward(batch, self.stage_type.TRAIN)
            loss = self.compute_objectives(predictions, batch, self.stage_type.TRAIN)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.optimizer_step += 2
        self.on_fit_batch_end(batch, predictions, loss, True)
        return loss.detach()


def every(steps: int, **kwargs: Any) -> Callbacks:
    arguments: dict[str, Any] = {"every_n_train_steps": steps, "save_last": True, **kwargs}
    return lambda folder: [ModelCheckpoint(folder, **arguments)]


WAYS: dict[str, tuple[Callbacks, Callable[[Any], bool], dict[str, Any]]] = {
    "in the first epoch": (every(5), at(1, 9), {}),
    "in the second epoch": (every(5), at(2, 6), {}),
    "after the last batch of an epoch": (every(BATCHES), at(2, 3), {}),
    "at the end of an epoch": (
        lambda folder: [ModelCheckpoint(folder, save_last=True)], at(2, 3), {}
    ),
    "at the end of an epoch by a metric": (
        lambda folder: [ModelCheckpoint(folder, monitor="valid_loss", save_last=True)],
        at(2, 3),
        {},
    ),
    "with accumulation": (every(2), at(2, 10), {"grad_accumulation_factor": 3}),
    "two updates a batch": (every(10), at(2, 3), {"cls": ByHand}),
    "before a validation within the epoch": (
        every(6), at(2, 9), {"arguments": {"val_check_interval": 6}}
    ),
    "after a validation within the epoch": (
        lambda folder: [ModelCheckpoint(folder, save_last=True)],
        at(1, 9),
        {"arguments": {"val_check_interval": 6}},
    ),
    "with a limit of batches": (every(4), at(1, 6), {"arguments": {"limit_train_batches": 7}}),
    "with the Trainer's accumulation": (
        every(2), at(2, 9), {"arguments": {"accumulate_grad_batches": 5}}
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_model_checkpoint_resumes(tmp_path: Path, way: str) -> None:
    callbacks, cut, options = WAYS[way]
    whole, resumed, _ = whole_and_resumed(tmp_path, callbacks, cut, **options)
    assert_same(whole, resumed)


def test_save_checkpoint_in_a_window_that_is_not_full(tmp_path: Path) -> None:
    def callbacks(folder: Path) -> list[Callback]:
        return [SavesAfter(folder / "x.ckpt", 4)]

    whole, resumed, _ = whole_and_resumed(
        tmp_path, callbacks, at(1, 8), "x.ckpt", grad_accumulation_factor=3
    )
    assert_same(whole, resumed)


@pytest.mark.parametrize("where", ["compute_forward", "compute_objectives", "evaluate_batch"])
def test_an_exception_leaves_a_checkpoint_that_resumes(tmp_path: Path, where: str) -> None:
    """A batch that failed is fitted again, and a validation that failed restarts."""
    whole = brain_in(None, grad_accumulation_factor=2)
    fit(whole, [])
    first = brain_in(None, grad_accumulation_factor=2)
    original = getattr(first, where)

    def failing(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if at(2, 4)(first):
            raise Cut
        return result

    setattr(first, where, failing)
    with pytest.raises(Cut):
        fit(first, [OnExceptionCheckpoint(tmp_path)])
    second = brain_in(None, grad_accumulation_factor=2)
    seed(77)
    fit(second, [OnExceptionCheckpoint(tmp_path)], "last")
    assert_same(whole, second)


def test_an_error_before_the_run_begins_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no HPC checkpoint was found"):
        fit(brain_in(None), [OnExceptionCheckpoint(tmp_path)], "hpc")
    # The checkpoint is from a run before its first batch.
    other = brain_in(None)
    fit(other, [], str(tmp_path / "on_exception.ckpt"))
    assert other.optimizer_step == 2 * BATCHES


def test_an_interval_without_a_checkpointer_is_the_trainers_affair(tmp_path: Path) -> None:
    whole = brain_in(None)
    fit(whole, [])
    first = brain_in(None, ckpt_interval_steps=5)
    first.cut = at(2, 8)
    with pytest.raises(Cut):
        fit(first, [ModelCheckpoint(tmp_path)])
    assert (tmp_path / "last-within-epoch.ckpt").exists()
    second = brain_in(None)
    fit(second, [ModelCheckpoint(tmp_path)], "last")
    assert second.hparams.events[1] == ("batch", 6, True)
    assert_same(whole, second)


def test_nobody_asked_for_an_interval(tmp_path: Path) -> None:
    brain = brain_in(None)
    assert brain.ckpt_interval_minutes == 15
    brain.ckpt_interval_minutes = 1e-9
    fit(brain, [ModelCheckpoint(tmp_path, every_n_epochs=9)])
    assert not (tmp_path / "last-within-epoch.ckpt").exists()


def test_the_newest_is_taken_where_there_is_no_last(tmp_path: Path) -> None:
    def callbacks(folder: Path) -> list[Callback]:
        return [ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=-1)]

    first = brain_in(None)
    first.cut = at(2, 4)
    with pytest.raises(Cut):
        fit(first, callbacks(tmp_path))
    # The modification time decides.
    for index, path in enumerate(sorted(tmp_path.glob("*.ckpt"), key=os.path.getmtime)):
        os.utime(path, (index, index))
    second = brain_in(None)
    with pytest.warns(UserWarning, match="there is no last checkpoint, so .*step=15.ckpt"):
        fit(second, callbacks(tmp_path), "last")
    assert second.hparams.events[1] == ("batch", 4, True)


def test_nothing_is_taken_where_there_is_nothing(tmp_path: Path) -> None:
    brain = brain_in(None)
    fit(brain, [ModelCheckpoint(tmp_path / "none", save_last=True)], "last")
    assert brain.hparams.events[1] == ("batch", 1, True)


@pytest.mark.filterwarnings("ignore:.*has no file for 'brain_lightning'")
def test_an_explicit_path_wins_over_the_checkpointer(tmp_path: Path) -> None:
    other = brain_in(tmp_path / "save")
    other.on_fit_start()
    other.modules.model.weight.data.fill_(7.0)
    other.checkpointer.save_checkpoint()
    whole = brain_in(tmp_path / "own")
    fit(whole, [ModelCheckpoint(tmp_path / "l", every_n_train_steps=18, save_top_k=-1)])
    (path,) = (tmp_path / "l").glob("*.ckpt")
    second = brain_in(tmp_path / "save")
    fit(second, [ModelCheckpoint(tmp_path / "l", every_n_train_steps=18, save_top_k=-1)], path)
    assert_same(whole, second)


def test_weights_alone_are_refused(tmp_path: Path) -> None:
    trainer = fit(brain_in(None), [])
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(CheckpointError, match=r"only weights.*load_from_checkpoint"):
        fit(brain_in(None), [], tmp_path / "weights.ckpt")


def test_a_finished_run_is_finished(tmp_path: Path) -> None:
    trainer = fit(brain_in(None), [])
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    brain = brain_in(None)
    fit(brain, [], tmp_path / "x.ckpt")
    assert brain.hparams.events == []


def test_epochs_without_a_counter_that_remembers(tmp_path: Path) -> None:
    brain = make(Regression)
    trainer = trainer_with(max_epochs=2)
    trainer.fit(to_lightning(brain), loader(), loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    resumed = make(Regression)
    trainer_with(max_epochs=3).fit(
        to_lightning(resumed), loader(), loader(), ckpt_path=tmp_path / "x.ckpt"
    )
    assert resumed.events[0] == ("start", "TRAIN", 3)
    assert len(resumed.events) == 4


def test_a_directory_becomes_a_file_that_resumes_and_back(tmp_path: Path) -> None:
    whole = brain_in(None)
    fit(whole, [])
    first = brain_in(tmp_path / "save", ckpt_interval_steps=5)
    first.cut = at(2, 8)
    with pytest.raises(Cut):
        first.fit(first.hparams.epoch_counter, train_set(), loader())
    assert main(["convert", str(tmp_path / "save"), str(tmp_path / "x.ckpt")]) == 0
    second = brain_in(tmp_path / "other", ckpt_interval_steps=3)
    second.cut = at(2, 11)
    with pytest.raises(Cut):
        fit(second, [SavesAfter(tmp_path / "y.ckpt", 22)], tmp_path / "x.ckpt")
    target = tmp_path / "back" / "CKPT+y"
    assert main(["convert", str(tmp_path / "y.ckpt"), str(target)]) == 0
    third = brain_in(tmp_path / "back")
    seed(9)
    third.fit(third.hparams.epoch_counter, train_set(), loader())
    assert third.hparams.events[1] == ("batch", 11, True)
    assert_same(whole, third)


def test_what_a_file_holds_can_be_loaded_safely(tmp_path: Path) -> None:
    brain = brain_in(None, grad_accumulation_factor=5)
    fit(brain, [SavesAfter(tmp_path / "x.ckpt", 7)])
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    files = content["brain_lightning"]["files"]
    assert files.keys() == {"brain.ckpt", "epoch_counter.ckpt"}
    other = make(Noisy, hparams={"events": []})
    type(to_lightning(other)).load_from_checkpoint(tmp_path / "x.ckpt", brain=other)
    assert all(
        torch.equal(mine, saved)
        for mine, saved in zip(weights(other), content["state_dict"].values(), strict=True)
    )
