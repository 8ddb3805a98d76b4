"""What loggers have of a run: its hyperparameters, and its rows over a kill."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from brain_lightning import Checkpointer, EpochCounter, LightningTrainLogger, to_lightning
from tests.support.brains import Regression, loader, make, trainer_with
from tests.support.plain_modules import PlainRegression

# ----------------------------------------------------------------------- hyperparameters

NESTED = {
    "lr": 0.1, "name": "asr", "sizes": (3, 4), "optimizer": {"lr": 0.2, "betas": [0, 1]},
    "rate": np.float32(0.5), "place": PurePosixPath("/data"), "on": [torch.device("cpu")],
}  # fmt: skip
PLAIN = {
    "lr": 0.1, "name": "asr", "sizes": [3, 4], "optimizer/lr": 0.2, "optimizer/betas": [0, 1],
    "rate": 0.5, "place": "/data", "on": ["cpu"],
}  # fmt: skip
# Not for loggers: objects, and data.
OTHERS = {"model": torch.nn.Linear(1, 1), "words": ["a"] * 101, "fs": [{"x": torch.nn.ReLU()}]}


class PlainWithHparams(PlainRegression):
    def __init__(self, **hparams: Any) -> None:
        super().__init__()
        self.save_hyperparameters(hparams)


class Counting(CSVLogger):
    """Counts how often it is given hyperparameters."""

    calls = 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self.calls += 1
        super().log_hyperparams(*args, **kwargs)


def fit_plain(loggers: list[Any]) -> None:
    trainer_with(logger=loggers, log_every_n_steps=1).fit(
        PlainWithHparams(**PLAIN), loader(), loader()
    )


def fit_module(loggers: list[Any]) -> None:
    brain = make(hparams=NESTED | OTHERS)
    trainer_with(logger=loggers, log_every_n_steps=1).fit(
        to_lightning(brain), loader(), loader()
    )


def fit_brain(loggers: list[Any]) -> None:
    brain = make(hparams=NESTED | OTHERS)
    brain.fit(range(1), loader(), trainer={"logger": loggers})


def fit_nested(loggers: list[Any]) -> None:
    class Nesting(Regression):
        def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
            if epoch != "within":
                self.fit(["within"], loader())

    brain = make(Nesting, hparams=NESTED | OTHERS | {"trainer": {"logger": loggers}})
    # Arguments of the Trainer are plain values too, and a logger is none.
    brain.fit(range(1), loader())


def fit_reporting(loggers: list[Any]) -> None:
    class Reporting(Regression):
        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            self.hparams.train_logger.log_stats({"epoch": epoch}, {"loss": stage_loss})

    train_logger = LightningTrainLogger(loggers)
    make(Reporting, hparams=NESTED | OTHERS | {"train_logger": train_logger}).fit(
        range(3), loader()
    )


@pytest.mark.parametrize("fit", [fit_module, fit_brain, fit_nested, fit_reporting])
def test_hyperparameters_reach_every_logger_once(
    tmp_path: Path, fit: Callable[[list[Any]], None]
) -> None:
    found = {}
    for name, each in {"plain": fit_plain, "brain": fit}.items():
        loggers = [Counting(tmp_path / name), TensorBoardLogger(tmp_path / name)]
        each(loggers)
        assert loggers[0].calls == 1
        written = yaml.safe_load(Path(loggers[0].log_dir, "hparams.yaml").read_text())
        found[name] = (written, dict(loggers[1].hparams))
    assert found["brain"] == found["plain"] == (PLAIN, PLAIN)


def test_a_file_has_the_hyperparameters_and_loads(tmp_path: Path) -> None:
    brain, plain = make(hparams=NESTED | OTHERS), PlainWithHparams(**PLAIN)
    found = []
    for module in (plain, to_lightning(brain)):
        trainer = trainer_with(max_epochs=1)
        trainer.fit(module, loader(), loader())
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        content = torch.load(tmp_path / "x.ckpt", weights_only=True)
        found.append(content["hyper_parameters"])
    assert found == [PLAIN, PLAIN]
    other = make(hparams={"lr": 3.0})
    loaded = type(to_lightning(other)).load_from_checkpoint(tmp_path / "x.ckpt", brain=other)
    assert loaded.hparams == {"lr": 3.0}
    assert torch.equal(other.modules.model.weight, brain.modules.model.weight)


# ----------------------------------------------------------------------- rows over a kill


class Kill(Callback):
    """Ends the process in a batch, with what a logger has not written yet lost."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.left -= 1
        if self.left < 0:
            trainer.logger.experiment.metrics.clear()
            raise KeyboardInterrupt


def rows(folder: Path) -> list[dict[str, str]]:
    with Path(folder, "log", "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(folder: Path) -> list[tuple[str, ...]]:
    return [
        (row["epoch"], row["step"], row["valid_loss"])
        for row in rows(folder)
        if row["valid_loss"]
    ]


def train(folder: Path, module: Any, kill: int | None = None, **kwargs: Any) -> None:
    # With what other callbacks log, and rows that wait in memory.
    logger = CSVLogger(folder / "log", name="", version="", flush_logs_every_n_steps=1000)
    saver = ModelCheckpoint(folder / "ckpt", every_n_train_steps=2, save_last=True)
    trainer = trainer_with(
        saver, LearningRateMonitor(), *([] if kill is None else [Kill(kill)]),
        logger=logger, max_epochs=3, enable_checkpointing=True, log_every_n_steps=1,
    )  # fmt: skip
    try:
        trainer.fit(module, loader(), loader(8), **kwargs)
    except (KeyboardInterrupt, SystemExit):
        assert kill is not None


def by_file(folder: Path, *kill: int) -> None:
    last = folder / "ckpt" / "last.ckpt"
    module = to_lightning(make(), epoch_counter=range(1, 4))
    train(folder, module, *kill, ckpt_path=last if last.exists() else None)


class Saving(Regression):
    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        if stage.name == "VALID":
            self.checkpointer.save_checkpoint()


def by_directory(folder: Path, *kill: int) -> None:
    counter = EpochCounter(3)
    brain = make(Saving, checkpointer=Checkpointer(folder / "save", {"counter": counter}))
    brain.checkpointer.add_recoverable("model", brain.modules.model)
    train(folder, to_lightning(brain, epoch_counter=counter), *kill)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
@pytest.mark.parametrize("run", [by_file, by_directory])
def test_rows_of_a_run_that_was_killed_are_those_of_one_that_was_not(
    tmp_path: Path, run: Callable[..., None]
) -> None:
    train(tmp_path / "plain", PlainRegression())
    run(tmp_path / "whole")
    # Within an epoch; at once after a resume; at the end of an epoch; within the next one.
    for kill in (6, 0, 3, 5):
        run(tmp_path / "killed", kill)
        assert rows(tmp_path / "killed")
    run(tmp_path / "killed")
    files = [tmp_path / name / "log" / "metrics.csv" for name in ("whole", "killed")]
    assert files[0].read_text() == files[1].read_text()
    assert losses(tmp_path / "killed") == losses(tmp_path / "plain")
    assert [step for _, step, _ in losses(tmp_path / "plain")] == ["4", "9", "14"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
def test_a_run_that_begins_replaces_the_rows_as_lightning_does(tmp_path: Path) -> None:
    for module in (PlainRegression(), to_lightning(make(), epoch_counter=range(1, 4))):
        folder = tmp_path / type(module).__name__
        train(folder, module, 7)
        with pytest.warns(UserWarning, match="Previous log files in this directory"):
            train(folder, module, ckpt_path=None)
        assert [step for _, step, _ in losses(folder)] == ["4", "9", "14"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
def test_the_row_of_an_epoch_that_ends_between_two_updates_is_kept(tmp_path: Path) -> None:
    for name, kills in {"whole": [()], "killed": [(6,), ()]}.items():
        for kill in kills:
            saver = Checkpointer(
                tmp_path / name / "save", {"counter": (count := EpochCounter(3))}
            )
            brain = make(Saving, checkpointer=saver, grad_accumulation_factor=3)
            train(tmp_path / name, to_lightning(brain, epoch_counter=count), *kill)
    assert [row[0] for row in losses(tmp_path / "whole")] == ["0", "1", "2"]
    assert [row[:2] for row in losses(tmp_path / "killed")] == [
        row[:2] for row in losses(tmp_path / "whole")
    ]


class Reporting(Saving):
    """Logs rows that differ in their values alone, also in hooks that are called again."""

    module: Any

    def report(self, name: str, value: float, step: int) -> None:
        for logger in self.module.trainer.loggers:
            logger.log_metrics({name: float(value)}, step)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.report("fit", 1, 0)

    def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
        self.report(f"start_{stage.name}", epoch, self.optimizer_step)

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> torch.Tensor:
        loss = super().compute_objectives(predictions, batch, stage)
        self.report(f"batch_{stage.name}", loss.item(), self.optimizer_step)
        if (stage.name, self.step) in self.hparams.saves:
            self.checkpointer.save_checkpoint()
        return loss


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
@pytest.mark.filterwarnings("ignore:A checkpoint is saved in the middle of a batch")
# Between epochs; in a validation; in a batch.
@pytest.mark.parametrize("saves", [(), [("VALID", 2)], [("TRAIN", 2)]])
def test_rows_of_one_step_with_the_same_names_are_kept_one_for_one(
    tmp_path: Path, saves: Any
) -> None:
    def run(folder: Path, *kill: int) -> None:
        saver = Checkpointer(folder / "save", {"counter": (count := EpochCounter(3))})
        brain = make(
            Reporting, hparams={"saves": saves}, checkpointer=saver, grad_accumulation_factor=3
        )
        saver.add_recoverable("model", brain.modules.model)
        brain.module = to_lightning(brain, epoch_counter=count)
        train(folder, brain.module, *kill)

    run(tmp_path / "whole")
    # Twice from one checkpoint; at once; twice from the next one.
    for kill in (8, 1, 0, 4, 1):
        run(tmp_path / "killed", kill)
    run(tmp_path / "killed")
    whole, killed = (rows(tmp_path / name) for name in ("whole", "killed"))
    assert len([row for row in whole if row["batch_TRAIN"]]) == 15
    assert killed == whole
