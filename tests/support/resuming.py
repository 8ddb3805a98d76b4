"""Runs that are cut anywhere and resumed, as in a new process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset

from brain_lightning import Checkpointer, EpochCounter, to_lightning

from .brains import Regression, all_equal, loader, make, trainer_with, weights
from .upstream import weights_only

BATCHES = 12


class Cut(RuntimeError):  # noqa: N818  no error of anybody's
    """What ends a run in these tests."""


class Noisy(Regression):
    """Random in every step; notes what its hooks were told, and is cut where it is told."""

    cut: Callable[[Noisy], bool] | None = None
    nan_at: int | None = None

    def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
        # Not in an attribute, which would be restored as what the epoch has gathered.
        self.hparams.events.append(("start", stage.name, epoch))

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        self.hparams.events.append(("end", stage.name, epoch))

    def on_fit_start(self) -> None:
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("model", self.modules.model)
        super().on_fit_start()

    def compute_forward(self, batch: Any, stage: Any) -> Any:
        x = batch[0]
        if stage.name == "TRAIN":
            x = torch.nn.functional.dropout(x, 0.3) * np.random.rand() + drawn()
        return self.modules.model(x)

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        loss = super().compute_objectives(predictions, batch, stage)
        return loss * torch.nan if self.step == self.nan_at else loss

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        self.hparams.events.append(("batch", self.step, should_step))

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        if self.cut is not None and self.cut(self):
            raise Cut


class Noise(Dataset[Any]):
    """Examples that are random, and counted."""

    loaded: list[int] | None = None

    def __init__(self, items: int = 4 * BATCHES) -> None:
        self.items = items

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> Any:
        if self.loaded is not None:
            self.loaded.append(index)
        x = torch.full((4,), index / self.items) + torch.rand(4) * np.random.rand()
        return x + drawn(), x[:2]


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def drawn() -> float:
    return random.random()  # noqa: S311


def at(epoch: int, step: int) -> Callable[[Noisy], bool]:
    return lambda brain: brain.hparams.epoch_counter.current == epoch and brain.step == step


def brain_in(folder: Path | None, **options: Any) -> Noisy:
    """A Brain, new as in a new process: nothing random is as it was."""
    counter = EpochCounter(2)
    checkpointer = None if folder is None else Checkpointer(folder, {"counter": counter})
    hparams = {"epoch_counter": counter, "events": []}
    brain: Noisy = make(Noisy, hparams=hparams, checkpointer=checkpointer, **options)
    seed(999)
    return brain


def fit(brain: Noisy, train: Any, **kwargs: Any) -> Noisy:
    brain.fit(brain.hparams.epoch_counter, train, loader(), **kwargs)
    return brain


def cut_and_resumed(
    folder: Path,
    make_train: Callable[[], Any],
    *cuts: Callable[[Noisy], bool],
    **options: Any,
) -> list[Noisy]:
    """The run that was never cut, and for each cut the one that went on where it was."""
    options = {"ckpt_interval_steps": 1, **options}
    brains = [fit(brain_in(folder / "whole", **options), make_train())]
    for number, cut in enumerate(cuts):
        first = brain_in(folder / f"cut{number}", **options)
        first.cut = cut
        with pytest.raises(Cut):
            fit(first, make_train())
        second = brain_in(folder / f"cut{number}", **options)
        seed(77)
        brains.append(fit(second, make_train()))
    return brains


def assert_same(whole: Noisy, *resumed: Noisy) -> None:
    for number, each in enumerate(resumed):
        assert all_equal(weights(whole), weights(each)), number
        assert whole.optimizer_step == each.optimizer_step, number
    assert not all_equal(weights(whole), weights(make()))


class Stream(IterableDataset[Any]):
    """Numbers, one after the other, by turns of the workers."""

    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for item in range(worker, 4 * BATCHES, workers):
            yield torch.full((4,), item / 48) + torch.rand(4), torch.zeros(2)


class StatefulStream(Stream):
    """The same, with a position; what it leaves out draws nothing."""

    done = 0

    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        mine = list(range(worker, 4 * BATCHES, workers))
        for item in mine[self.done :]:
            self.done += 1
            yield torch.full((4,), item / 48) + torch.rand(4), torch.zeros(2)
        self.done = 0

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


# ------------------------------------------------------------ by a Trainer of the user's

Callbacks = Callable[[Path], list[Callback]]


def shuffled_by_workers() -> DataLoader[Any]:
    return DataLoader(Noise(), 4, shuffle=True, num_workers=2)


def fit_with_trainer(
    brain: Noisy,
    callbacks: list[Callback],
    ckpt_path: Any = None,
    **arguments: Any,
) -> Trainer:
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    trainer = trainer_with(*callbacks, max_epochs=-1, enable_checkpointing=saves, **arguments)
    module = to_lightning(brain)
    trainer.fit(
        module, shuffled_by_workers(), loader(), ckpt_path=ckpt_path, **weights_only(True)
    )
    return trainer


def whole_and_resumed(
    folder: Path,
    callbacks: Callbacks,
    cut: Callable[[Any], bool],
    ckpt_path: str = "last",
    cls: type[Noisy] = Noisy,
    arguments: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Noisy, Noisy, Trainer]:
    """As ``cut_and_resumed``, with a Trainer's checkpoints."""
    arguments = arguments or {}

    def brain() -> Noisy:
        new = brain_in(None, **options)
        new.__class__ = cls
        return new

    whole = brain()
    expected = fit_with_trainer(whole, callbacks(folder / "whole"), **arguments)
    first = brain()
    first.cut = cut
    with pytest.raises(Cut):
        fit_with_trainer(first, callbacks(folder / "cut"), **arguments)
    second = brain()
    seed(77)
    path = ckpt_path if ckpt_path == "last" else folder / "cut" / ckpt_path
    found = fit_with_trainer(second, callbacks(folder / "cut"), path, **arguments)
    assert (found.global_step, found.current_epoch) == (
        expected.global_step,
        expected.current_epoch,
    )
    whole_events, events = whole.hparams.events, second.hparams.events
    assert events[0][:2] == ("start", "TRAIN")
    assert events[1:] == whole_events[len(whole_events) - len(events) + 1 :]
    return whole, second, found
