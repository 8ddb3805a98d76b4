"""Writes the checkpoints of brain_lightning 0.1.0 that are kept here, and says how they end.

``PYTHONPATH=CHECKOUT python tests/support/golden/version_0.py``, where ``CHECKOUT`` is one of
revision 00ac38e. It needs nothing else of the tests.
"""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from brain_lightning import Brain, Checkpointer, EpochCounter, to_lightning

ARCHIVE = Path(__file__).with_suffix(".tar.xz")
EXPECTED = Path(__file__).with_suffix(".json")
BATCHES, EPOCHS = 6, 3


class Cut(RuntimeError):  # noqa: N818  no error of anybody's
    """What ends a run here."""


class Small(Brain):
    """Draws a random number in each step, sums up an epoch, and saves at its end."""

    cut: Callable[[Small], bool] | None = None

    def on_fit_start(self) -> None:
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("model", self.modules.model)
        super().on_fit_start()

    def compute_forward(self, batch: Any, stage: Any) -> Tensor:
        x = batch[0]
        return self.modules.model(
            x + 0.1 * torch.randn_like(x) if stage.name == "TRAIN" else x
        )

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Tensor:
        return nn.functional.mse_loss(predictions, batch[1])

    def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
        if stage.name == "TRAIN":
            self.seen: list[float] = []

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        self.seen.append(float(loss.detach()))
        if self.cut is not None and self.cut(self):
            raise Cut

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        if stage.name == "TRAIN":
            self.hparams.sums[str(epoch)] = [sum(self.seen), stage_loss]
        elif self.checkpointer is not None:
            self.checkpointer.save_and_keep_only(meta={"epoch": epoch})


def new(folder: Path | None = None, steps: int = 0) -> Small:
    """A Brain as in a new process, with another random state than the run began with."""
    torch.manual_seed(0)
    counter = EpochCounter(EPOCHS)
    saver = None if folder is None else Checkpointer(folder, {"counter": counter})
    brain = Small(
        {"model": nn.Linear(4, 2)},
        lambda parameters: torch.optim.Adam(parameters, 0.01),
        {"epoch_counter": counter, "sums": {}},
        {
            "device": "cpu", "grad_accumulation_factor": 4, "ckpt_interval_minutes": 0,
            "ckpt_interval_steps": steps,
        },
        saver,
    )  # fmt: skip
    torch.manual_seed(77)
    return brain


def data() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """What to train and to validate on."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4 * BATCHES, 4, generator=generator)
    examples = TensorDataset(x, x[:, :2].flip(1))
    return DataLoader(examples, 4, shuffle=True), DataLoader(examples, 8)


def fit(brain: Small) -> Small:
    """Fits by the Brain's own Trainer."""
    train, valid = data()
    brain.fit(brain.hparams.epoch_counter, train, valid, progressbar=False)
    return brain


def fit_with_trainer(brain: Small, *callbacks: Callback, path: Path | None = None) -> Small:
    """Fits by a Trainer, from a file."""
    trainer = Trainer(
        accelerator="cpu", max_epochs=-1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
    )  # fmt: skip
    train, valid = data()
    trainer.fit(to_lightning(brain), train, valid, ckpt_path=path)
    return brain


def outcome(brain: Small) -> dict[str, Any]:
    """How a run has ended, as numbers."""
    model: Any = brain.modules.model
    return {
        "weight": model.weight.tolist(),
        "bias": model.bias.tolist(),
        "optimizer_step": brain.optimizer_step,
        "sums": brain.hparams.sums,
    }


class Saves(Callback):
    """Saves a file within an epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 2):
            trainer.save_checkpoint(self.path)


def _cut_at(epoch: int, step: int) -> Callable[[Small], bool]:
    return lambda brain: brain.hparams.epoch_counter.current == epoch and brain.step == step


def _cut(fit_it: Callable[..., Any], brain: Small, *args: Any) -> None:
    torch.manual_seed(3)
    try:
        fit_it(brain, *args)
    except Cut:
        return
    sys.exit("the run was to be cut")


def extract(folder: Path) -> None:
    """Extracts the checkpoints to a folder."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")


def write(folder: Path) -> None:
    """Writes checkpoints after three batches of the second epoch, and at the end of it."""
    for name, steps, cut in (("within", 3, _cut_at(2, 5)), ("end", 0, _cut_at(3, 2))):
        brain = new(folder / name, steps)
        brain.cut = cut
        _cut(fit, brain)
        for older in sorted((folder / name).iterdir())[:-1]:
            shutil.rmtree(older)
    brain = new()
    brain.cut = _cut_at(3, 2)
    at_ends = ModelCheckpoint(folder, "end", enable_version_counter=False)
    _cut(fit_with_trainer, brain, Saves(folder / "within.ckpt"), at_ends)


def main() -> None:
    """Writes everything."""
    whole = new()
    torch.manual_seed(3)
    EXPECTED.write_text(json.dumps(outcome(fit(whole)), indent=1) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        with tarfile.open(ARCHIVE, "w:xz") as archive:
            archive.add(folder, ".")


if __name__ == "__main__":
    main()
