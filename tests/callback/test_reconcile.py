"""Trainer arguments and run options: each is used, translated, or raises an error.

``python -m pytest tests/callback/test_reconcile.py -v`` prints the table.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from brain_lightning import RunOptionError, to_lightning
from tests.support.brains import (
    Regression,
    all_equal,
    dataset,
    loader,
    make,
    sgd,
    trainer_with,
    weights,
)
from tests.support.documents import ROOT
from tests.support.rows import Table, call

# Lightning warns about workers, loggers and similar settings.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ROWS = Table()


def fit(brain: Any, train: Any = None, **kwargs: Any) -> Trainer:
    trainer = trainer_with(**kwargs)
    trainer.fit(to_lightning(brain), loader() if train is None else train, loader())
    return trainer


class Counting(Regression):
    """Counts batches of each stage, and records which of them had an update."""

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        self.steps = [*getattr(self, "steps", []), should_step]

    def evaluate_batch(self, batch: Any, stage: Any) -> Any:
        self.evaluated = [*getattr(self, "evaluated", []), stage.name]
        self.modes = (torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        return super().evaluate_batch(batch, stage)


def stages(brain: Any) -> list[str]:
    return [f"{when} {stage}" for when, stage, _ in brain.events]


EPOCH = ["start TRAIN", "end TRAIN", "start VALID", "end VALID"]


@ROWS.row("gradient_clip_val", "translated into max_grad_norm")
def gradient_clip_val() -> None:
    for brain_class in (Regression, Manual):
        asked, translated = make(brain_class, max_grad_norm=0.01), make(brain_class)
        fit(asked)
        trainer = fit(translated, gradient_clip_val=0.01)
        assert all_equal(weights(asked), weights(translated))
        assert trainer.gradient_clip_val == 0.01
        assert translated.max_grad_norm == 5.0


class Manual(Regression):
    def fit_batch(self, batch: Any) -> Any:
        return super().fit_batch(batch)


@ROWS.row("gradient_clip_algorithm", "honoured")
def gradient_clip_algorithm() -> None:
    brain, by_hand = make(), make()
    fit(brain, gradient_clip_val=0.01, gradient_clip_algorithm="value", max_epochs=1)
    optimizer = sgd(by_hand.modules.parameters())
    for batch in loader():
        by_hand.compute_objectives(
            by_hand.compute_forward(batch, None), batch, None
        ).backward()
        nn.utils.clip_grad_value_(by_hand.modules.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
    assert all_equal(weights(brain), weights(by_hand))


@ROWS.row(
    "accumulate_grad_batches", "translated into grad_accumulation_factor, last window kept"
)
def accumulate_grad_batches() -> None:
    for brain_class in (Counting, CountingManually):
        brain = make(brain_class)
        trainer = fit(brain, accumulate_grad_batches=3)
        assert brain.steps == [False, False, True, False, True] * 2
        assert trainer.accumulate_grad_batches == 3
        assert brain.grad_accumulation_factor == 1
        assert trainer.global_step == brain.optimizer_step == 4
    plain = PlainModule()
    trainer_with(accumulate_grad_batches=3, gradient_clip_val=5.0).fit(plain, loader())
    ours = make()
    fit(ours, accumulate_grad_batches=3)
    assert all_equal(weights(ours), [p.detach() for p in plain.parameters()])


class CountingManually(Counting):
    def fit_batch(self, batch: Any) -> Any:
        return super().fit_batch(batch)


class PlainModule(LightningModule):
    """Runs a plain LightningModule with the same data and arguments."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.mse_loss(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


@ROWS.row("precision", "translated into precision and eval_precision")
def precision() -> None:
    for brain_class in (Regression, Manual):
        asked = make(brain_class, precision="bf16", eval_precision="bf16")
        translated = make(brain_class)
        fit(asked)
        trainer = fit(translated, precision="bf16-mixed")
        assert all_equal(weights(asked), weights(translated))
        assert trainer.precision == "bf16-mixed"
        assert translated.precision == "fp32"
    plain = make()
    fit(plain)
    assert not all_equal(weights(plain), weights(translated))


@ROWS.row("precision=64-true", "honoured")
def true_precision() -> None:
    brain = make()
    fit(brain, precision="64-true")
    assert {p.dtype for p in brain.modules.parameters()} == {torch.float64}


@ROWS.row("max_epochs", "honoured")
def max_epochs() -> None:
    brain = make(hparams={"epoch_counter": range(5)})
    fit(brain, max_epochs=3)
    assert stages(brain) == EPOCH * 3


@ROWS.row("max_steps", "honoured")
def max_steps() -> None:
    for brain_class in (Regression, Manual):
        brain = make(brain_class)
        trainer = fit(brain, max_steps=7, max_epochs=-1)
        assert brain.optimizer_step == trainer.global_step == 7
        assert stages(brain) == EPOCH * 2


@ROWS.row("min_epochs", "honoured")
def min_epochs() -> None:
    class Impatient(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = True

    brain = make()
    fit(brain, min_epochs=2, max_epochs=5, callbacks=[Impatient()])
    assert brain.optimizer_step == 10


@ROWS.row("max_time", "honoured")
def max_time(clock: Any) -> None:
    class Slow(Regression):
        def on_fit_batch_end(self, *_: Any) -> None:
            clock.now += 0.2

    brain = make(Slow)
    fit(brain, max_time={"milliseconds": 100}, max_epochs=5)
    assert brain.optimizer_step == 1
    assert stages(brain) == EPOCH


@ROWS.row("limit_train_batches", "honoured")
def limit_train_batches() -> None:
    for limit in (2, 0.4):
        brain = make()
        fit(brain, limit_train_batches=limit)
        assert brain.optimizer_step == 4
        assert stages(brain) == EPOCH * 2
    nothing = make()
    fit(nothing, limit_train_batches=0)
    assert nothing.optimizer_step == 0


@ROWS.row("limit_val_batches, limit_test_batches, limit_predict_batches", "honoured")
def limit_evaluation_batches() -> None:
    for limit in (2, 0.4):
        brain = make(Counting)
        trainer = fit(
            brain, limit_val_batches=limit, limit_test_batches=limit,
            limit_predict_batches=limit, max_epochs=1,
        )  # fmt: skip
        trainer.test(to_lightning(brain), loader(), verbose=False)
        assert brain.evaluated == ["VALID"] * 2 + ["TEST"] * 2
        assert len(trainer.predict(to_lightning(brain), loader())) == 2
    unvalidated = make()
    fit(unvalidated, limit_val_batches=0, max_epochs=1)
    assert stages(unvalidated) == EPOCH[:2]


@ROWS.row("fast_dev_run", "honoured")
def fast_dev_run() -> None:
    brain = make(Counting)
    fit(brain, fast_dev_run=2)
    assert (brain.optimizer_step, brain.evaluated) == (2, ["VALID"] * 2)
    assert stages(brain) == EPOCH


@ROWS.row("overfit_batches", "honoured")
def overfit_batches() -> None:
    class Seeing(Regression):
        def compute_forward(self, batch: Any, stage: Any) -> Any:
            if stage.name == "TRAIN":
                self.seen = [*getattr(self, "seen", []), batch[0].clone()]
            return super().compute_forward(batch, stage)

    brain = make(Seeing)
    fit(brain, DataLoader(dataset(), batch_size=4, shuffle=True), overfit_batches=2)
    assert len(brain.seen) == 4
    assert all_equal(brain.seen[:2], brain.seen[2:])
    assert torch.equal(brain.seen[0], dataset().tensors[0][:4])


@ROWS.row("val_check_interval", "honoured")
def val_check_interval() -> None:
    for interval in (2, 0.4):
        brain = make(Counting, grad_accumulation_factor=2)
        fit(brain, val_check_interval=interval, max_epochs=1)
        validation = ["start VALID", "end VALID"]
        assert stages(brain) == ["start TRAIN", *validation, *validation, "end TRAIN"]
        assert brain.steps == [False, True, False, True, False]
    # A validation within an epoch does not change the training.
    watched, unwatched = make(), make()
    fit(watched, val_check_interval=2)
    fit(unwatched)
    assert all_equal(weights(watched), weights(unwatched))


@ROWS.row("check_val_every_n_epoch", "honoured")
def check_val_every_n_epoch() -> None:
    brain = make()
    fit(brain, check_val_every_n_epoch=2, max_epochs=3)
    assert stages(brain) == [*EPOCH[:2], *EPOCH, *EPOCH[:2]]


@ROWS.row("num_sanity_val_steps", "switched off with one line: recipes set up VALID in TRAIN")
def num_sanity_val_steps(caplog: Any) -> None:
    brain = make()
    with caplog.at_level("INFO"):
        trainer = fit(brain, num_sanity_val_steps=2)
    assert stages(brain) == EPOCH * 2
    assert "The sanity check (num_sanity_val_steps) is disabled" in caplog.text
    assert trainer.num_sanity_val_steps == 2


@ROWS.row("detect_anomaly", "honoured")
def detect_anomaly() -> None:
    class Broken(Regression):
        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            loss = super().compute_objectives(predictions, batch, stage)
            return loss + (0 * predictions[0, 0]).sqrt()

    with pytest.raises(RuntimeError, match="returned nan values"):
        fit(make(Broken), detect_anomaly=True)


@ROWS.row("profiler", "honoured")
def profiler() -> None:
    trainer = fit(make(), profiler="simple")
    actions = trainer.profiler.summary()
    assert "SingleDeviceStrategy.training_step" in actions
    assert "RegressionModule.optimizer_step" in actions


@ROWS.row("barebones", "honoured")
def barebones() -> None:
    brain, other = make(), make()
    Trainer(accelerator="cpu", max_epochs=2, barebones=True).fit(
        to_lightning(brain), loader(), loader()
    )
    fit(other)
    assert all_equal(weights(brain), weights(other))


@ROWS.row("deterministic, benchmark", "honoured")
def deterministic_and_benchmark() -> None:
    class Asking(Regression):
        def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
            self.asked = (
                torch.are_deterministic_algorithms_enabled(),
                torch.backends.cudnn.benchmark,
            )

    brain = make(Asking)
    try:
        fit(brain, deterministic=True, benchmark=True)
        assert brain.asked == (True, True)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG")


@ROWS.row("reload_dataloaders_every_n_epochs", "honoured")
def reload_dataloaders() -> None:
    made: list[str] = []

    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            made.append("train")
            return loader()

        def val_dataloader(self) -> Any:
            made.append("valid")
            return loader()

    brain, other = make(), make()
    trainer_with(reload_dataloaders_every_n_epochs=1, max_epochs=3).fit(
        to_lightning(brain), Data()
    )
    fit(other, max_epochs=3)
    assert made.count("train") == made.count("valid") == 3
    assert all_equal(weights(brain), weights(other))
    assert stages(brain) == EPOCH * 3


@ROWS.row("use_distributed_sampler", "without effect on one process")
def use_distributed_sampler() -> None:
    brain, other = make(), make()
    fit(brain, use_distributed_sampler=True)
    fit(other, use_distributed_sampler=False)
    assert all_equal(weights(brain), weights(other))


@ROWS.row("inference_mode", "translated into torch.no_grad, as a Brain evaluates")
def inference_mode() -> None:
    brain = make(Counting)
    trainer = trainer_with(inference_mode=True)
    trainer.test(to_lightning(brain), loader(), verbose=False)
    assert brain.modes == (False, False)
    trainer.validate(to_lightning(brain), loader(), verbose=False)
    assert brain.modes == (False, False)
    assert trainer.test_loop.inference_mode


@ROWS.parametrize()
def test_table(test: Callable[..., None], request: Any) -> None:
    call(test, request)


def test_the_reference_has_every_row() -> None:
    reference = (ROOT / "examples" / "porting" / "reference.md").read_text()
    for name in ROWS:
        assert f"`{name.split(',')[0].split('=')[0]}`" in reference, name


# ---------------------------------------------------------------------------- conflicts


@pytest.mark.parametrize(
    ("options", "arguments", "both"),
    [
        ({"max_grad_norm": 1.0}, {"gradient_clip_val": 2.0},
         r"max_grad_norm=1\.0 and Trainer\(gradient_clip_val=2\.0\)"),
        ({"grad_accumulation_factor": 2}, {"accumulate_grad_batches": 3},
         r"grad_accumulation_factor=2 and Trainer\(accumulate_grad_batches=3\)"),
        ({"precision": "fp32"}, {"precision": "bf16-mixed"},
         r"precision='fp32' and Trainer\(precision='bf16-mixed'\)"),
    ],
)  # fmt: skip
def test_two_explicit_values_that_differ_name_both(
    options: dict[str, Any], arguments: dict[str, Any], both: str
) -> None:
    brain = make(**options)
    with pytest.raises(RunOptionError, match=both):
        fit(brain, **arguments)
    assert "events" not in vars(brain)
    hparams = make(hparams={k: v for k, v in options.items() if v != "fp32"})
    if hparams._lightning.explicit_options & options.keys():
        with pytest.raises(RunOptionError, match=both):
            fit(hparams, **arguments)


def test_two_equal_explicit_values_are_no_conflict() -> None:
    brain = make(max_grad_norm=1.0, grad_accumulation_factor=3, precision="bf16")
    fit(brain, gradient_clip_val=1.0, accumulate_grad_batches=3, precision="bf16-mixed")
    assert brain.optimizer_step == 4


def test_an_explicit_evaluation_precision_stands() -> None:
    class Asking(Regression):
        def compute_forward(self, batch: Any, stage: Any) -> Any:
            asked = (stage.name, torch.is_autocast_enabled("cpu"))
            self.asked = {asked, *getattr(self, "asked", ())}
            return super().compute_forward(batch, stage)

    brain = make(Asking, eval_precision="fp32")
    fit(brain, precision="bf16-mixed")
    assert brain.asked == {("TRAIN", True), ("VALID", False)}


def test_the_last_window_of_a_set_without_length_cannot_be_kept() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([dataset()[i] for i in range(6)])

    with pytest.raises(RunOptionError, match="Use the run option grad_accumulation_factor=3"):
        fit(make(), DataLoader(Stream(), batch_size=2), accumulate_grad_batches=3)


def test_a_trainers_arguments_are_what_they_were_after_an_error() -> None:
    class Failing(Regression):
        def on_fit_batch_end(self, *_: Any) -> None:
            raise RuntimeError("power cut")

    trainer = trainer_with(
        gradient_clip_val=0.1, accumulate_grad_batches=2, precision="bf16-mixed",
        num_sanity_val_steps=2,
    )  # fmt: skip
    plugin = trainer.precision_plugin
    brain = make(Failing)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.fit(to_lightning(brain), loader(), loader())
    assert (trainer.gradient_clip_val, trainer.accumulate_grad_batches) == (0.1, 2)
    assert (trainer.precision_plugin, trainer.num_sanity_val_steps) == (plugin, 2)
    assert (brain.max_grad_norm, brain.precision, brain.grad_accumulation_factor) == (
        5.0,
        "fp32",
        1,
    )
