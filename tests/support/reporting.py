"""A Brain that reports, runs of it that are killed, and what is then in the logs."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import speechbrain
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from brain_lightning import Checkpointer, EpochCounter, LightningTrainLogger

from .brains import Regression, loader, make

Row = dict[str, str]


class Stub(Logger):
    """Any other logger."""

    name, version = "stub", 0

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.entries.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class Killed(RuntimeError):  # noqa: N818  no error of anybody's
    """What ends a run in these tests."""


class Reporting(Regression):
    """Logs an epoch and saves it; is killed in between where it is told."""

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        log_stats = self.hparams.train_logger.log_stats
        if stage.name == "TRAIN":
            self.train_stats = {"loss": stage_loss, "accuracy": epoch / 8}
        elif stage.name == "VALID":
            valid = {"loss": stage_loss, "WER": 30.0 - epoch}
            if getattr(self.hparams, "sounds", False):
                sound = torch.full((80,), epoch / 10)
                self.hparams.train_logger.log_audio("voice", sound, 8000)
            log_stats({"epoch": epoch, "lr": 0.1}, self.train_stats, valid)
            if epoch == self.hparams.killed_in:
                raise Killed
            if self.checkpointer is not None:
                self.checkpointer.save_and_keep_only(meta={"loss": stage_loss})
        else:
            loaded = {"Epoch loaded": self.hparams.epoch_counter.current}
            log_stats(loaded, test_stats={"loss": stage_loss, "WER": 5.0})


def reporting(
    train_logger: Any,
    folder: Path | None = None,
    epochs: int = 4,
    killed_in: int = 0,
    **more: Any,
) -> Any:
    counter = EpochCounter(epochs)
    hparams = {
        "train_logger": train_logger, "epoch_counter": counter, "killed_in": killed_in, **more
    }  # fmt: skip
    checkpointer = None if folder is None else Checkpointer(folder, {"counter": counter})
    brain = make(Reporting, hparams=hparams, checkpointer=checkpointer)
    if checkpointer is not None:
        checkpointer.add_recoverable("model", brain.modules.model)
    return brain


def train(brain: Any) -> None:
    brain.fit(brain.hparams.epoch_counter, loader(), loader(8))


def train_and_test(brain: Any) -> None:
    train(brain)
    brain.evaluate(loader(12))


def killed(brain: Any) -> None:
    with pytest.raises(Killed):
        train(brain)


def killed_twice_and_resumed(
    train_logger: Callable[[], Any], folder: Path, **more: Any
) -> None:
    """Each time in a process of its own, as far as objects go."""
    for killed_in in (2, 3):
        killed(reporting(train_logger(), folder / "save", killed_in=killed_in, **more))
    train_and_test(reporting(train_logger(), folder / "save", **more))


def rows_in(folder: Path) -> list[Row]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def steps_in(folder: Path) -> list[str]:
    return [row["step"] for row in rows_in(folder)]


def scalars_in(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def csv_logger(folder: Path, **kwargs: Any) -> Callable[[], LightningTrainLogger]:
    return lambda: LightningTrainLogger(CSVLogger(folder, **kwargs))


def tensorboard_logger(folder: Path, **kwargs: Any) -> Callable[[], LightningTrainLogger]:
    return lambda: LightningTrainLogger(TensorBoardLogger(folder, **kwargs))


def media(train_logger: LightningTrainLogger) -> None:
    train_logger.log_stats({"epoch": 3}, {"loss": 1.0})
    train_logger.log_audio("voice", torch.linspace(-1.5, 1.5, 800).reshape(1, -1), 8000)
    train_logger.log_figure("spectrogram", torch.rand(1, 8, 5, requires_grad=True))
    train_logger.log_figure("attention", Figure())


def speechbrain_reporting(train_logger: Any) -> Any:
    """The same Brain on SpeechBrain's loop."""
    namespace = {
        name: vars(cls)[name]
        for cls in (Regression, Reporting)
        for name in ("compute_forward", "compute_objectives", "on_stage_end")
        if name in vars(cls)
    }
    cls = type("SpeechBrainReporting", (speechbrain.Brain,), namespace)
    counter = speechbrain.utils.epoch_loop.EpochCounter(4)
    hparams = {"train_logger": train_logger, "epoch_counter": counter, "killed_in": 0}
    return make(cls, hparams=hparams)
