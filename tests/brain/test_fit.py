"""Trainers, modules and Brains that are used for several runs, and runs that fail."""

from __future__ import annotations

import gc
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.multiprocessing import active_children
from torch.utils.data import DataLoader, IterableDataset

from brain_lightning import (
    BrainTypeError,
    EpochCounter,
    RunOptionError,
    UnsupportedError,
    lightning_module_class,
    parse_arguments,
    to_lightning,
)
from tests.parity.recipes import ChangingBatches
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
from tests.support.upstream import needs_lightning, weights_only

# Lightning warns about workers, loggers and similar settings.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Plain(LightningModule):
    """A LightningModule without a Brain."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.mse_loss(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


def test_weights_loaded_before_a_fit_do_not_come_back_after_it(tmp_path: Path) -> None:
    trainer = trainer_with()
    trainer.fit(to_lightning(make()), loader())
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    brain = make()
    module = lightning_module_class(Regression).load_from_checkpoint(
        tmp_path / "old.ckpt", brain=brain, **weights_only(False)
    )
    trainer_with().fit(module, loader())
    trained = weights(brain)
    trainer_with().test(module, loader(), verbose=False)
    assert all_equal(weights(brain), trained)


def test_a_refused_run_leaves_trainer_and_brain_as_they_were() -> None:
    trainer = trainer_with(
        gradient_clip_val=0.5, precision="bf16-mixed", accumulate_grad_batches=2
    )
    brain = make(precision="fp32")
    with pytest.raises(RunOptionError):
        trainer.fit(to_lightning(brain), loader())
    assert (trainer.gradient_clip_val, trainer.accumulate_grad_batches) == (0.5, 2)
    assert brain.max_grad_norm == 5.0


def test_the_next_module_of_a_trainer_is_on_its_own() -> None:
    brain = make(hparams={"epoch_counter": EpochCounter(1)})
    trainer = trainer_with(max_epochs=5)
    trainer.fit(to_lightning(brain), loader(), loader())
    events = list(brain.events)
    trainer.fit(Plain(), loader())
    assert brain.events == events
    assert trainer.current_epoch == 5


def test_one_module_can_be_fitted_twice() -> None:
    brain, other = make(), make()
    module = to_lightning(brain)
    for _ in range(2):
        trainer_with().fit(module, loader(), loader())
        other.fit(range(1, 3), loader(), loader())
    assert all_equal(weights(brain), weights(other))
    assert brain.events == other.events


def test_a_trainer_that_runs_already_is_refused() -> None:
    class Nested(Regression):
        def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
            if stage.name == "TRAIN":
                self.evaluate(loader())

    brain = make(Nested, hparams={"trainer": trainer_with()})
    with pytest.raises(UnsupportedError, match="Pass a dict of Trainer arguments"):
        brain.fit(range(1), loader())


def test_the_brain_follows_the_trainers_device() -> None:
    """Uses the device "meta", which exists on every machine."""
    module = to_lightning(make())
    module.brain._lightning.explicit_options -= {"device"}
    module.trainer = trainer_with()
    module.trainer.strategy._root_device = torch.device("meta")
    module.configure_callbacks()
    assert module.brain.device == module.brain.device_type == "meta"


def test_a_device_given_to_both_is_a_conflict() -> None:
    trainer = trainer_with()
    trainer.strategy._root_device = torch.device("meta")
    with pytest.raises(
        RunOptionError, match=r"device='cpu' and Trainer\(accelerator='meta'\)"
    ):
        trainer.fit(to_lightning(make()), loader())


# ------------------------------------------------------------------ what a recipe reports


@pytest.mark.parametrize(
    ("signature", "arguments"),
    [
        (lambda epoch, stats: None, (1, {"WER": 3.0})),
        (lambda stats_meta, valid_stats=None: None, ({"lr": 1}, {"WER": 3.0})),
        (lambda text, losses: None, ("epoch 1", [1.0])),
    ],
)
def test_any_train_logger_may_be_used(signature: Any, arguments: Any) -> None:
    class Logger:
        def __init__(self) -> None:
            self.log_stats = signature

    class Logging(Regression):
        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            self.hparams.train_logger.log_stats(*arguments)

    brain = make(Logging, hparams={"train_logger": Logger()})
    trainer = trainer_with(max_epochs=1)
    trainer.fit(to_lightning(brain), loader(), loader())
    # A recipe may use any name that is not part of SpeechBrain's interface.
    assert ("valid_WER" in trainer.callback_metrics) == (arguments[0] == {"lr": 1})
    assert brain.hparams.train_logger.log_stats is signature


def test_lightnings_own_names_stay_lightnings(tmp_path: Path) -> None:
    class Logger:
        def log_stats(self, stats_meta: Any, valid_stats: Any = None) -> None:
            pass

    class Logging(Regression):
        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            if stage.name == "VALID":
                self.hparams.train_logger.log_stats(
                    {"epoch": epoch, "step": 99}, {"WER": epoch}
                )

    brain = make(Logging, hparams={"train_logger": Logger()})
    saving = ModelCheckpoint(tmp_path, monitor="WER", save_top_k=-1)
    trainer_with(enable_checkpointing=True, callbacks=[saving]).fit(
        to_lightning(brain), loader(), loader()
    )
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == [
        "epoch=0-step=5.ckpt", "epoch=1-step=10.ckpt",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments", [{"val_check_interval": 2}, {"check_val_every_n_epoch": 2}]
)
def test_the_plain_loss_is_always_valids(arguments: dict[str, Any]) -> None:
    brain = make()
    trainer = trainer_with(**arguments)
    trainer.fit(to_lightning(brain), loader(), loader())
    metrics = trainer.callback_metrics
    assert metrics["loss"] == metrics["valid_loss"] != metrics["train_loss"]


# ------------------------------------------------------------- limits, lengths and workers


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([dataset()[i] for i in range(12)])


@pytest.mark.parametrize(
    "argument", ["limit_train_batches", "limit_val_batches", "val_check_interval"]
)
def test_a_fraction_of_a_set_without_length_is_refused(argument: str) -> None:
    stream = DataLoader(Stream(), batch_size=2)
    trainer = trainer_with(**{argument: 0.4})
    with pytest.raises(RunOptionError, match=rf"{argument}=0\.4.*Use a number of batches"):
        trainer.fit(to_lightning(make()), stream, stream)


def test_a_whole_number_limits_a_set_whose_length_changes() -> None:
    class Counting(Regression):
        def evaluate_batch(self, batch: Any, stage: Any) -> Any:
            self.evaluated = getattr(self, "evaluated", 0) + 1
            return super().evaluate_batch(batch, stage)

    def changing() -> Any:
        return DataLoader(dataset(), batch_sampler=ChangingBatches(2, 4))

    brain = make(Counting)
    trainer = trainer_with(limit_train_batches=100, limit_val_batches=3)
    trainer.fit(to_lightning(brain), changing(), changing())
    assert (brain.optimizer_step, brain.evaluated) == (6, 5)


@needs_lightning("2.6")
def test_validation_by_time() -> None:
    brain = make()
    trainer_with(val_check_interval=timedelta(0), max_epochs=1).fit(
        to_lightning(brain), loader(), loader()
    )
    assert brain.events.count(("start", "VALID", 1)) == 5


def test_no_worker_outlives_a_limited_validation() -> None:
    class Looking(Regression):
        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            self.workers = [*getattr(self, "workers", []), len(active_children())]

    gc.collect()
    before = len(active_children())
    brain = make(Looking)
    valid = DataLoader(dataset(), batch_size=4, num_workers=2)
    trainer_with(limit_val_batches=2).fit(to_lightning(brain), loader(), valid)
    assert brain.workers == [before] * 4


# --------------------------------------------------------------------- who decides


def test_the_command_line_outranks_the_call() -> None:
    opts = parse_arguments(["h.yaml", "--device=cpu", "--trainer.max_steps=3"]).run_opts
    brain = Regression({"model": nn.Linear(4, 2)}, sgd, {}, opts)
    brain.fit(range(2), loader(), trainer={"callbacks": []}, progressbar=False)
    assert brain.optimizer_step == 3
    with pytest.raises(BrainTypeError, match=r"--trainer\.max_steps cannot change"):
        brain.fit(range(2), loader(), trainer=trainer_with())


def test_an_unknown_trainer_argument_is_named_with_a_guess() -> None:
    with pytest.raises(RunOptionError, match=r"'max_step'. Did you mean 'max_steps'"):
        make().fit(range(1), loader(), trainer={"max_step": 3})


def test_hparams_count_as_explicit_even_where_they_name_the_default() -> None:
    brain = make(hparams={"max_grad_norm": 5.0})
    with pytest.raises(RunOptionError, match="gradient_clip_val"):
        trainer_with(gradient_clip_val=0.1).fit(to_lightning(brain), loader())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_grad_norm": "5"}, "max_grad_norm='5' is a string"),
        ({"optimizer_step_limit": "5"}, "optimizer_step_limit='5' is a string"),
        ({"device": "gpu"}, "device 'gpu' is not valid. Use cpu, cuda"),
    ],
)
def test_values_that_make_no_sense_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RunOptionError, match=words):
        make(**options)


def test_the_accumulation_window_of_a_trainer_ends_with_its_run() -> None:
    brain = make(grad_accumulation_factor=2)
    trainer_with(accumulate_grad_batches=2).fit(to_lightning(brain), loader())
    steps, brain.step = brain.optimizer_step, 1
    brain.fit_batch(next(iter(loader())))
    assert brain.optimizer_step == steps


class Nested(Regression):
    """Calls its own fit before each epoch, as the discriminator in MetricGAN."""

    inner = False

    def on_fit_start(self) -> None:
        if not self.inner:
            super().on_fit_start()

    def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
        super().on_stage_start(stage, epoch)
        if stage.name == "TRAIN" and not self.inner:
            self.inner = True
            self.fit(range(1), loader())
            self.inner = False


def test_limits_and_callbacks_are_those_of_the_outer_fit() -> None:
    stopper = EarlyStopping("valid_loss", patience=9)
    saver = ModelCheckpoint(monitor="valid_loss", every_n_epochs=9)
    arguments = {"callbacks": [stopper, saver], "max_steps": 7, "limit_train_batches": 2}
    brain = make(Nested, hparams={"trainer": arguments})
    brain.fit(range(2), loader(), loader())
    # Five steps in each inner fit, and two in each outer fit.
    assert brain.optimizer_step == 2 * (5 + 2)
    assert stopper.wait_count == 0
    other = make(hparams={"trainer": {"max_steps": 3}})
    other.fit(range(2), loader())
    assert other.optimizer_step == 3
