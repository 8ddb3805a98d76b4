"""A user's Trainer: fit, validate, test, predict, DataModules, LightningCLI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import CombinedLoader
from speechbrain.utils.checkpoints import Checkpointer
from torch import nn

from brain_lightning import (
    EpochCounter,
    lightning_module_class,
    to_lightning,
)
from tests.support.brains import (
    Regression,
    all_equal,
    dataset,
    loader,
    make,
    trainer_with,
    weights,
)
from tests.support.upstream import weights_only

# Lightning warns about workers, loggers and similar settings.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return [loader(), loader(8)]

    def test_dataloader(self) -> Any:
        return loader(12)

    def predict_dataloader(self) -> Any:
        return loader()


class Watched(Regression):
    def evaluate_batch(self, batch: Any, stage: Any) -> Any:
        self.events.append((stage.name, self.step, self.modules.training))
        return super().evaluate_batch(batch, stage)


def test_validate() -> None:
    brain = make(Watched)
    trainer_with().validate(to_lightning(brain), loader(8), verbose=False)
    assert brain.events == [
        ("start", "VALID", None), ("VALID", 1, False), ("VALID", 2, False),
        ("end", "VALID", None),
    ]  # fmt: skip


def test_validate_reports_the_epoch_of_the_counter() -> None:
    counter = EpochCounter(5)
    next(counter)
    brain = make(hparams={"epoch_counter": counter})
    trainer_with().validate(to_lightning(brain), loader(8), verbose=False)
    assert brain.events == [("start", "VALID", 1), ("end", "VALID", 1)]


def test_test_is_evaluate() -> None:
    brain, other = make(Watched), make(Watched)
    trainer = trainer_with()
    (results,) = trainer.test(to_lightning(brain), loader(), verbose=False)
    assert other.evaluate(loader()) == pytest.approx(results["test_loss"])
    assert brain.events == other.events


def test_predict_is_compute_forward_in_eval_mode() -> None:
    class Forward(Regression):
        def compute_forward(self, batch: Any, stage: Any) -> Any:
            self.seen = (stage.name, self.modules.training, torch.is_inference_mode_enabled())
            return super().compute_forward(batch, stage)

    brain = make(Forward)
    predictions = trainer_with().predict(to_lightning(brain), loader())
    assert brain.seen == ("TEST", False, False)
    expected = [brain.modules.model(batch[0]).detach() for batch in loader()]
    assert all_equal([p.detach() for p in predictions], expected)


def test_a_datamodule_with_several_validation_loaders() -> None:
    brain, other = make(), make()
    trainer = trainer_with()
    trainer.fit(to_lightning(brain), datamodule=Data())
    valid = [("start", "VALID"), ("end", "VALID")]
    train = [("start", "TRAIN"), ("end", "TRAIN")]
    assert [event[:2] for event in brain.events] == [*train, *valid, *valid] * 2
    other.fit(range(2), loader())
    assert all_equal(weights(brain), weights(other))
    trainer.test(to_lightning(brain), datamodule=Data(), verbose=False)
    assert len(trainer.predict(to_lightning(brain), datamodule=Data())) == 5


def test_several_loaders_are_stages_one_after_the_other() -> None:
    brain = make(Watched, hparams={"epoch_counter": range(1)})
    trainer_with().fit(to_lightning(brain), loader(4), [loader(8), loader(4)])
    assert brain.events[2:] == [
        ("start", "VALID", 0), ("VALID", 1, False), ("VALID", 2, False), ("end", "VALID", 0),
        ("start", "VALID", 0), ("VALID", 1, False), ("end", "VALID", 0),
    ]  # fmt: skip


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
def test_training_on_several_loaders_together(mode: Any) -> None:
    class Joint(Regression):
        def compute_forward(self, batch: Any, stage: Any) -> Any:
            parts = [part for part in batch.values() if part is not None]
            return super().compute_forward(parts[0], stage)

        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            parts = [part for part in batch.values() if part is not None]
            return super().compute_objectives(predictions, parts[0], stage)

    brain = make(Joint)
    both = CombinedLoader({"a": loader(), "b": loader(8)}, mode)
    trainer_with().fit(to_lightning(brain), both)
    assert brain.optimizer_step == 2 * (2 if mode == "min_size" else 5)


def test_a_list_of_training_loaders_is_cycled_as_in_lightning() -> None:
    class Joint(Regression):
        def compute_forward(self, batch: Any, stage: Any) -> Any:
            return super().compute_forward(batch[1], stage)

        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            return super().compute_objectives(predictions, batch[1], stage)

    brain = make(Joint)
    trainer_with().fit(to_lightning(brain), [loader(), loader(8)])
    assert brain.optimizer_step == 10


def test_explicit_weights_win_over_the_best_checkpoint(tmp_path: Path) -> None:
    brain = make(checkpointer=None)
    trainer = trainer_with()
    trainer.fit(to_lightning(brain), loader())
    trainer.save_checkpoint(tmp_path / "explicit.ckpt")
    explicit = weights(brain)

    best = make()
    checkpointer = Checkpointer(tmp_path / "best", {"model": best.modules.model})
    checkpointer.save_checkpoint()
    evaluated = make(checkpointer=Checkpointer(tmp_path / "best"))
    evaluated.checkpointer.add_recoverable("model", evaluated.modules.model)
    evaluated.checkpointer.allow_partial_load = True
    module = to_lightning(evaluated)
    trainer.test(module, loader(), verbose=False, ckpt_path=tmp_path / "explicit.ckpt",
                 **weights_only(False))  # fmt: skip
    assert all_equal(weights(evaluated), explicit)
    trainer.test(module, loader(), verbose=False)
    assert all_equal(weights(evaluated), weights(best))


def test_weights_load_into_a_brain(tmp_path: Path) -> None:
    brain, other = make(), make()
    trainer = trainer_with()
    trainer.fit(to_lightning(brain), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    lightning_module_class(Regression).load_from_checkpoint(
        tmp_path / "last.ckpt", brain=other, **weights_only(False)
    )
    assert all_equal(weights(brain), weights(other))


# ------------------------------------------------------------------------ LightningCLI


class FromCommandLine(Regression):
    """A Brain that LightningCLI can create, because every argument has a type."""

    def __init__(self, features: int = 4, lr: float = 0.1) -> None:
        super().__init__(
            {"model": nn.Linear(features, 2)},
            lambda parameters: torch.optim.SGD(parameters, lr=lr),
            run_opts={"device": "cpu", "noprogressbar": True},
        )


def test_lightning_cli(monkeypatch: pytest.MonkeyPatch) -> None:
    # jsonargparse sets it itself, with a warning about Lightning's use of it.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    quiet = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
    cli = LightningCLI(
        lightning_module_class(FromCommandLine),
        Data,
        args=[
            "fit", "--model.brain.lr=0.2",
            "--trainer.max_epochs=2", "--trainer.accelerator=cpu",
            *(f"--trainer.{name}=false" for name in quiet),
        ],
        save_config_callback=None,
        seed_everything_default=False,
    )  # fmt: skip
    assert cli.model.brain.optimizer.param_groups[0]["lr"] == 0.2
    assert cli.model.brain.optimizer_step == 10
    assert len(dataset()) == 20
