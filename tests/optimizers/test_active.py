"""A Brain that learns without gradients, optimizers and parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from brain_lightning import to_lightning
from brain_lightning.optimizers.active import has_optimizer
from brain_lightning.resume.before_batch import parameters
from tests.parity.recipes import dataset
from tests.parity.recipes import loader as traced
from tests.parity.sides import OURS, SPEECHBRAIN, Record, Side, assert_equal, attach, run
from tests.support.brains import loader, make, trainer_with


class Mean(nn.Module):
    """The running mean of its inputs. It has only buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(6))
        self.register_buffer("count", torch.zeros(()))


def statistics_brain(side: Side, modules: dict[str, nn.Module]) -> Any:
    class Statistics(side.Brain):
        def compute_forward(self, batch: Any, stage: Any) -> Any:
            return batch[0]

        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            mean = self.hparams.mean
            return (predictions - mean.total / mean.count.clamp(min=1)).square().mean()

        def fit_batch(self, batch: Any) -> Any:
            mean = self.hparams.mean
            mean.total += batch[0].sum(0)
            mean.count += len(batch[0])
            return self.compute_objectives(batch[0], batch, side.Stage.TRAIN)

    # A module of hparams, outside of modules.
    hparams = {"mean": modules.get("mean") or Mean()}
    options = {"device": "cpu", "noprogressbar": True}
    return Statistics(modules, hparams=hparams, run_opts=options)


@pytest.mark.parametrize("inside", [True, False], ids=["in_modules", "in_hparams"])
def test_statistics_are_speechbrains(inside: bool) -> None:
    def scenario(side: Side, record: Record) -> Any:
        brain = statistics_brain(side, {"mean": Mean()} if inside else {})
        attach(record, brain)
        brain.fit(side.EpochCounter(2), traced(record, brain), traced(record, brain))
        brain.evaluate(traced(record, brain))
        record.results.append(brain.hparams.mean.total.tolist())
        return brain

    ours, brain = run(OURS, scenario)
    theirs, _ = run(SPEECHBRAIN, scenario)
    assert_equal(ours, theirs)
    seen = torch.stack([x for x, _ in dataset()]).mean(0)
    torch.testing.assert_close(brain.hparams.mean.total / brain.hparams.mean.count, seen)


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual")  # see test_raw_steps
def test_lightning_saves_it_as_often_as_requested(tmp_path: Path) -> None:
    brain = statistics_brain(OURS, {"mean": Mean()})
    folder = tmp_path / "saved"
    saver = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer = trainer_with(saver, enable_checkpointing=True)
    batches = DataLoader(dataset(), batch_size=4)
    trainer.fit(to_lightning(brain), batches, batches)
    assert sorted(path.name for path in folder.iterdir()) == [
        "step=10.ckpt", "step=2.ckpt", "step=4.ckpt", "step=6.ckpt", "step=8.ckpt",
    ]  # fmt: skip
    saved = torch.load(folder / "step=2.ckpt", weights_only=False)["state_dict"]
    assert saved["brain_modules.mean.count"] == 8


def test_max_steps_counts_its_batches() -> None:
    brain = statistics_brain(OURS, {"mean": Mean()})
    trainer = trainer_with(max_steps=3, max_epochs=-1)
    batches = DataLoader(dataset(), batch_size=4)
    trainer.fit(to_lightning(brain), batches, batches)
    assert brain.hparams.mean.count == 12


def test_batches_of_the_default_fit_batch_count_too() -> None:
    """As in SpeechBrain, ``optimizers_step`` returns if there is no optimizer."""
    brain = make(opt_class=None)
    trainer = trainer_with(max_steps=3, max_epochs=-1)
    trainer.fit(to_lightning(brain), loader(), loader())
    assert (trainer.global_step, brain.optimizer_step) == (3, 0)


@pytest.mark.parametrize("place", ["attribute", "dict", "hparams"])
def test_an_optimizer_is_found_wherever_a_recipe_stores_it(place: str) -> None:
    brain = make()
    brain.opt_class = None
    assert not has_optimizer(brain)
    outside = nn.Parameter(torch.zeros(1))
    found = torch.optim.SGD([outside], 0.1)
    if place == "dict":
        brain.own = {"adversary": found}
    else:
        (brain if place == "attribute" else brain.hparams).own = found
    assert has_optimizer(brain)
    # A save in the middle of a batch also undoes the step of this optimizer.
    assert parameters(brain)[-1] is outside
