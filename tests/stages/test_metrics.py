"""Metrics of a recipe reach ``monitor=`` and Lightning's loggers without a change."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.train_logger import FileTrainLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from brain_lightning import EpochCounter, Stage, to_lightning
from brain_lightning.stages.metrics import Metrics
from tests.support.brains import Regression, loader, make, trainer_with

# Warnings of Lightning about workers and loggers, which every Lightning user sees.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

WER = [30.0, 20.0, 25.0, 22.0, 10.0]


class Logging(Regression):
    """Reports metrics like a recipe."""

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        super().on_stage_end(stage, stage_loss, epoch)
        if stage.name == "TRAIN":
            self.train_stats = {"loss": stage_loss, "accuracy": 0.5}
        elif stage.name == "VALID":
            self.hparams.train_logger.log_stats(
                {"epoch": epoch, "lr": 0.1, "name": "run"},
                train_stats=self.train_stats,
                valid_stats={"loss": stage_loss, "WER": WER[epoch - 1]},
            )
        else:
            self.hparams.train_logger.log_stats({}, test_stats={"WER": torch.tensor(5.0)})


class Saving(Regression):
    """Reports metrics in the meta of its checkpoints."""

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        super().on_stage_end(stage, stage_loss, epoch)
        if stage.name == "VALID":
            self.checkpointer.save_and_keep_only(
                meta={"WER": WER[epoch - 1]}, min_keys=["WER"]
            )


class Watching(Callback):
    """Records the metrics that callbacks can monitor at the end of a validation."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def logging_brain(folder: Path, epochs: int = 5) -> Any:
    hparams = {
        "train_logger": FileTrainLogger(str(folder / "train_log.txt")),
        "epoch_counter": EpochCounter(epochs),
    }
    return make(Logging, hparams=hparams)


def fit(brain: Any, *callbacks: Any, **kwargs: Any) -> Trainer:
    trainer = trainer_with(*callbacks, **{"max_epochs": -1} | kwargs)
    trainer.fit(to_lightning(brain), loader(), loader())
    return trainer


def test_losses_are_the_stages_own() -> None:
    losses: dict[str, float] = {}

    class Remembering(Regression):
        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            losses[f"{stage.name.lower()}_loss"] = stage_loss

    watching = Watching()
    brain = make(Remembering, hparams={"epoch_counter": range(1)})
    trainer = fit(brain, watching)
    trainer.test(to_lightning(brain), loader(), verbose=False)
    expected = {k: pytest.approx(v) for k, v in losses.items() if k != "test_loss"}
    (seen,) = watching.seen
    # The loss of the last batch, as in a LightningModule (tests.plain_lightning.test_numbers).
    del seen["train_loss_step"]
    assert seen == expected | {"loss": expected["valid_loss"]}
    assert float(trainer.callback_metrics["test_loss"]) == pytest.approx(losses["test_loss"])


def test_numbers_reach_all_who_read_them_without_self_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LightningModule, "log", log := Mock())
    brain = make(Regression)
    trainer = trainer_with(max_epochs=1)
    trainer.fit(to_lightning(brain), loader(), loader())
    seen = [trainer.callback_metrics, trainer.logged_metrics]
    for metrics in seen:
        assert {name: value.dtype for name, value in metrics.items()} == {
            "train_loss": torch.float32, "valid_loss": torch.float32, "loss": torch.float32,
            "train_loss_step": torch.float32,
        }  # fmt: skip
    shown = trainer.progress_bar_metrics
    assert shown == {n: float(seen[0][n]) for n in ("train_loss", "valid_loss")}
    (found,) = trainer.validate(to_lightning(brain), loader(), verbose=False)
    assert found == {n: float(seen[0][n]) for n in ("valid_loss", "loss")}
    # No state of the epoch or of the Brain's connector is left.
    assert trainer.callback_metrics.keys() == found.keys()
    assert not hasattr(trainer._logger_connector, "brain_numbers")
    log.assert_not_called()


def test_what_a_recipe_logs_has_its_stage_and_valid_wins(tmp_path: Path) -> None:
    watching = Watching()
    brain = logging_brain(tmp_path, epochs=1)
    trainer = fit(brain, watching)
    seen = watching.seen[0]
    assert seen["WER"] == seen["valid_WER"] == 30.0
    assert seen["accuracy"] == seen["train_accuracy"] == 0.5
    assert seen["lr"] == pytest.approx(0.1)
    # Lightning counts epochs itself, and uses the number in file names.
    assert "epoch" not in seen
    assert "name" not in seen
    trainer.test(to_lightning(brain), loader(), verbose=False)
    assert float(trainer.callback_metrics["test_WER"]) == 5.0
    # The recipe's own log is unchanged.
    log = (tmp_path / "train_log.txt").read_text()
    assert "valid WER: 30.00" in log
    assert "log_stats" not in vars(brain.hparams.train_logger)


def test_early_stopping_on_what_an_unedited_recipe_logs(tmp_path: Path) -> None:
    brain = logging_brain(tmp_path)
    fit(brain, EarlyStopping("WER", patience=2))
    # Epoch 2 is the best. Epochs 3 and 4 are not better.
    assert brain.hparams.epoch_counter.current == 4
    assert brain.events[-1] == ("end", "VALID", 4)


def test_early_stopping_on_the_meta_of_checkpoints(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    counter = EpochCounter(5)
    brain = make(Saving, hparams={"epoch_counter": counter}, checkpointer=checkpointer)
    fit(brain, EarlyStopping("WER", patience=2))
    assert counter.current == 4
    assert brain.checkpointer.find_checkpoint(min_key="WER").meta["WER"] == 20.0


def test_model_checkpoint_on_what_a_recipe_logs(tmp_path: Path) -> None:
    saving = ModelCheckpoint(
        tmp_path / "best", monitor="valid_WER", filename="{valid_WER:.0f}"
    )
    fit(logging_brain(tmp_path), saving, enable_checkpointing=True)
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["valid_WER=10.ckpt"]


def rows(trainer: Trainer) -> list[dict[str, str]]:
    with open(Path(str(trainer.log_dir)) / "metrics.csv") as file:
        return list(csv.DictReader(file))


def test_csv_logger_has_the_losses_of_each_epoch(tmp_path: Path) -> None:
    brain = logging_brain(tmp_path, epochs=3)
    trainer = fit(brain, logger=CSVLogger(tmp_path), log_every_n_steps=2)
    epochs = [row for row in rows(trainer) if row["valid_loss"]]
    assert len(epochs) == 3
    assert all(row["train_loss"] and row["valid_WER"] for row in epochs)
    assert [float(row["valid_WER"]) for row in epochs] == WER[:3]
    running = [row for row in rows(trainer) if row["train_loss_step"]]
    assert [int(row["step"]) for row in running] == [1, 3, 5, 7, 9, 11, 13]


def test_csv_logger_without_validation(tmp_path: Path) -> None:
    trainer = trainer_with(logger=CSVLogger(tmp_path))
    trainer.fit(to_lightning(make(hparams={"epoch_counter": range(2)})), loader())
    assert len([row for row in rows(trainer) if row["train_loss"]]) == 2


def test_tensorboard_logger(tmp_path: Path) -> None:
    trainer = fit(logging_brain(tmp_path, epochs=2), logger=TensorBoardLogger(tmp_path))
    events = EventAccumulator(str(trainer.log_dir))
    events.Reload()
    assert [e.value for e in events.Scalars("valid_WER")] == WER[:2]
    assert len(events.Scalars("train_loss")) == 2


def test_brain_fit_writes_nothing_anywhere() -> None:
    # The hygiene fixture asserts that the current folder stays empty.
    brain = make()
    brain.fit(range(1), loader(), loader())
    brain.evaluate(loader())
    assert Path.cwd().exists()


def test_brain_fit_logs_where_it_is_asked_to(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    make().fit(range(2), loader(), loader(), trainer={"logger": logger})
    assert "valid_loss" in (Path(logger.log_dir) / "metrics.csv").read_text()


def test_several_validation_loaders_are_numbered() -> None:
    class TwoSets(Regression):
        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            super().on_stage_end(stage, stage_loss, epoch)
            self.losses = [*getattr(self, "losses", []), stage_loss]

    watching = Watching()
    brain = make(TwoSets, hparams={"epoch_counter": range(1)})
    trainer = trainer_with(watching)
    trainer.fit(to_lightning(brain), loader(), [loader(), loader(8)])
    assert watching.seen[0]["valid_loss_0"] == pytest.approx(brain.losses[1])
    assert watching.seen[0]["valid_loss_1"] == pytest.approx(brain.losses[2])
    assert "valid_loss" not in watching.seen[0]


def test_a_test_stands_for_no_validation() -> None:
    metrics = Metrics(lambda: Stage.TEST)
    metrics.add(Stage.TEST, {"WER": 50.0, "loss": 1.0})
    assert metrics.take() == {"test_WER": 50.0, "test_loss": 1.0}


def test_the_loss_of_a_step_is_its_own() -> None:
    class Listening(Logger):
        name, version, rows = "l", 0, []

        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            self.rows.append((step, metrics))

        def log_hyperparams(self, *_: Any) -> None:
            """Does nothing."""

    class Keeping(Regression):
        def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, step: Any) -> None:
            self.losses = [*getattr(self, "losses", []), float(loss)]

    brain, listening = make(Keeping), Listening()
    arguments = {"logger": listening, "log_every_n_steps": 2}
    brain.fit(range(1), loader(), trainer=arguments)
    found = [row["train_loss_step"] for _, row in listening.rows if "train_loss_step" in row]
    assert found == [brain.losses[1], brain.losses[3]]


def test_a_test_is_logged_where_the_brain_is(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    brain = make(hparams={"trainer": {"logger": logger}})
    brain.fit(EpochCounter(2), loader(), loader())
    brain.evaluate(loader())
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    (tested,) = [row for row in rows if row["test_loss"]]
    assert int(tested["step"]) == brain.optimizer_step == 10
    assert {row["epoch"] for row in rows} == {"0", "1", tested["epoch"]}
    trainer = trainer_with()
    trainer.test(to_lightning(brain), loader(), verbose=False)
    assert trainer.global_step == trainer.current_epoch == 0


def test_early_stopping_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    # The loss falls, so the second epoch does not have a higher one.
    stopping = EarlyStopping("valid_loss", mode="max", patience=1)
    make().fit(EpochCounter(5), loader(), loader(), trainer={"callbacks": [stopping]})
    assert "EarlyStopping('valid_loss') ended the training after epoch 2." in caplog.messages
