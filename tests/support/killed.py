"""Runs with callbacks of Lightning: left alone, killed in an epoch, and resumed."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.spike import TrainingSpikeException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from brain_lightning import Checkpointer, EpochCounter, to_lightning

from .brains import Regression, dataset, loader, sgd, trainer_with
from .resuming import Cut, seed
from .upstream import weights_only

EPOCHS, BATCHES = 3, 5
# A Trainer's file by fit(ckpt_path=...), or a directory of the Brain's Checkpointer.
WAYS = ("file", "directory")
# Both are saved after each second batch, and the batch of the kill is lost.
EVERY, KILLED_IN = 2, (2, 4)


class Recipe(Regression):
    """A backbone and a head, noisy, with a learning rate that the recipe anneals."""

    killed_in: tuple[int, int] | None = None
    trained = ("backbone", "head")

    @property
    def moment(self) -> tuple[int, int]:
        return self.hparams.epoch_counter.current, self.step

    def init_optimizers(self) -> None:
        parts = [p for name in self.trained for p in self.modules[name].parameters()]
        self.optimizer = sgd(parts)
        self.optimizers_dict = {"optimizer": self.optimizer}
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("optimizer", self.optimizer)

    def compute_forward(self, batch: Any, stage: Any) -> Tensor:
        x = batch[0]
        if stage.name == "TRAIN":
            x = nn.functional.dropout(x, 0.3)
        return self.modules.head(self.modules.backbone(x))

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        self.hparams.fitted.append((*self.moment, should_step))
        if self.moment == self.killed_in:
            raise Cut

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        super().on_stage_end(stage, stage_loss, epoch)
        if stage.name == "VALID":
            self.optimizer.param_groups[0]["lr"] *= 0.8


@dataclass
class Ended:
    """A run that has ended, or was killed.

    Attributes:
        brain: The Brain.
        trainer: Its Trainer.
        callbacks: Those of the case.
        folder: For its files, and those of the run that it resumes.
        error: The name of what has ended it, but for the kill.
        shown: What it has printed and logged.
    """

    brain: Any
    trainer: Trainer
    callbacks: Sequence[Any]
    folder: Path
    error: str = ""
    shown: str = ""

    @property
    def first(self) -> Any:
        """The callback whose effect is looked at."""
        return self.callbacks[0]

    def rows(self) -> set[tuple[str, str]]:
        """The columns and steps of what was logged, each once: a batch may be fitted again."""
        texts = [file.read_text() for file in self.folder.rglob("metrics.csv")]
        rows = [row for text in texts for row in csv.DictReader(text.splitlines())]
        return {(name, row["step"]) for row in rows for name, value in row.items() if value}

    def files(self) -> dict[str, list[Tensor]]:
        """The files of ModelCheckpoint, with the weights in them."""
        return {
            path.name: list(load(path)["state_dict"].values())
            for path in self.folder.glob("files/*.ckpt")
        }


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=False)
    return content


@dataclass(frozen=True)
class Case:
    """Callbacks, whose effect is to be the same after a kill and a resume.

    Attributes:
        make: Makes them, given a folder for their files.
        effect: What the first one has done; something, and equal.
        cls: The Brain.
        norm: Whether its backbone has a BatchNorm.
        arguments: Makes those of the Trainer.
        ways: What resumes the run.
        logs: Whether there is a logger.
    """

    make: Callable[[Path], Sequence[Callback]]
    effect: Callable[[Ended], Any]
    cls: type[Recipe] = Recipe
    norm: bool = False
    arguments: Callable[[], dict[str, Any]] = dict
    ways: tuple[str, ...] = WAYS
    logs: bool = False


class Runs:
    """Makes the runs of a case, each as in a process of its own.

    Args:
        case: The case.
        way: What is saved: one of ``WAYS``, or nothing.
        capsys: What the runs print.
        caplog: What they log.
    """

    def __init__(self, case: Case, way: str, capsys: Any, caplog: Any) -> None:
        self.case, self.way = case, way
        self.capsys, self.caplog = capsys, caplog

    def run(self, folder: Path, killed_in: tuple[int, int] | None = None) -> Ended:
        """Trains from what is in the folder."""
        brain = self.brain(folder)
        brain.killed_in = killed_in
        callbacks = self.case.make(folder / "files")
        seed(3)
        ended = Ended(brain, self.trainer(folder, callbacks), callbacks, folder)
        self.caplog.clear()
        try:
            self.fit(ended)
        except Cut:
            assert brain.moment == killed_in
        except TrainingSpikeException as error:
            ended.error = str(error)
        shown = self.capsys.readouterr()
        ended.shown = shown.out + shown.err + self.caplog.text
        return ended

    def brain(self, folder: Path) -> Any:
        torch.manual_seed(0)
        norm = [nn.BatchNorm1d(6)] if self.case.norm else []
        backbone = nn.Sequential(nn.Linear(4, 6), *norm, nn.ReLU())
        modules = {"backbone": backbone, "head": nn.Linear(6, 2)}
        counter = EpochCounter(EPOCHS)
        options = {"device": "cpu", "noprogressbar": True, "ckpt_interval_minutes": 0}
        checkpointer = None
        if self.way == "directory":
            checkpointer = Checkpointer(folder / "save", {**modules, "counter": counter})
            options["ckpt_interval_steps"] = EVERY
        hparams = {"epoch_counter": counter, "fitted": []}
        return self.case.cls(modules, sgd, hparams, options, checkpointer)

    def trainer(self, folder: Path, callbacks: Sequence[Callback]) -> Trainer:
        savers = []
        if self.way == "file":
            savers = [
                ModelCheckpoint(
                    folder / "saved", "saved", every_n_train_steps=EVERY,
                    enable_version_counter=False,
                )
            ]  # fmt: skip
        saves = any(isinstance(each, Checkpoint) for each in (*callbacks, *savers))
        logger = CSVLogger(folder) if self.case.logs else False
        arguments = {
            "max_epochs": EPOCHS, "enable_checkpointing": saves, "default_root_dir": folder,
            "logger": logger, "log_every_n_steps": 1,
        }  # fmt: skip
        return trainer_with(*callbacks, *savers, **arguments | self.case.arguments())

    def fit(self, ended: Ended) -> None:
        saved = next(iter(ended.folder.rglob("saved.ckpt")), None)
        ended.trainer.fit(
            to_lightning(ended.brain),
            DataLoader(dataset(4 * BATCHES), 4, shuffle=True),
            loader(8),
            ckpt_path=saved,
            **weights_only(False),
        )


def assert_resumed(whole: Ended, resumed: Ended, effect: Callable[[Ended], Any]) -> None:
    """A run that was resumed in its middle has come to the same, and its callbacks too."""
    fitted = resumed.brain.hparams.fitted
    assert fitted[0][0] == KILLED_IN[0]
    assert fitted == whole.brain.hparams.fitted[-len(fitted) :]
    assert comparable(resumed.brain.modules.state_dict()) == comparable(
        whole.brain.modules.state_dict()
    )
    counts = [(e.trainer.global_step, e.trainer.current_epoch) for e in (whole, resumed)]
    assert counts[0] == counts[1]
    expected = comparable(effect(whole))
    assert expected
    assert comparable(effect(resumed)) == expected


def comparable(value: Any) -> Any:
    """A value that ``==`` compares, with tensors in it as numbers."""
    if isinstance(value, dict):
        return {key: comparable(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [comparable(each) for each in value]
    return value.tolist() if isinstance(value, Tensor) else value
