"""A Brain with much state that a trial may change, and functions that record the state."""

from __future__ import annotations

import random
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from brain_lightning import Checkpointer, to_lightning
from brain_lightning.distributed.communication import world_size
from brain_lightning.fsdp2.tensors import local
from brain_lightning.trials import batch_size, learning_rate
from tests.parity.recipes import classifier, dataset, two_modules
from tests.parity.sides import OURS, Side
from tests.support.brains import trainer_with
from tests.support.environment import seed_everything

ITEMS, BATCHES = 40, 10
# Larger batches do not fit.
MEMORY = 16


class Annealing:
    """Sets the learning rate at each step, like NoamScheduler."""

    def __init__(self) -> None:
        self.steps, self.rates = 0, []

    def __call__(self, optimizer: Any) -> None:
        self.steps += 1
        self.rates.append(0.05 / self.steps)
        for group in optimizer.param_groups:
            group["lr"] = self.rates[-1]


class TrainLogger:
    """A train logger that writes lines to a file."""

    def __init__(self, file: Path) -> None:
        self.file, self.lines = file, 0

    def log_stats(self, *_: Any, **stats: Any) -> None:
        self.lines += 1
        with self.file.open("a") as file:
            file.write(f"{stats}\n")


def on_stage_start(self: Any, stage: Any, epoch: Any = None) -> None:
    self.seen = {"stage": stage.name, "epoch": epoch, "losses": []}
    self.array = np.zeros(3)


def on_fit_batch_end(
    self: Any, batch: Any, outputs: Any, loss: Any, should_step: bool
) -> None:
    self.seen["losses"].append(loss.item())
    self.array[self.step % 3] += random.random() + np.random.rand()  # noqa: S311
    self.hparams.annealing(self.optimizer)
    self.hparams.train_logger.log_stats({"step": self.step}, train_stats={"loss": loss.item()})
    self.hparams.loggers[1].log_stats({"step": self.step})
    if self.step % 4 == 0:
        self.checkpointer.save_and_keep_only({"step": self.step}, num_to_keep=1)


def on_stage_end(self: Any, stage: Any, stage_loss: float, epoch: Any = None) -> None:
    self.ends = [*getattr(self, "ends", []), (stage.name, epoch, stage_loss)]


def compute_objectives(self: Any, predictions: Tensor, batch: Any, stage: Any) -> Tensor:
    if self.error is not None and self.step == 2:
        raise self.error
    if len(batch[0]) > self.memory and stage.name == "TRAIN":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    return nn.functional.cross_entropy(predictions, batch[1])


HOOKS = {
    each.__name__: each
    for each in (on_stage_start, on_fit_batch_end, on_stage_end, compute_objectives)
}


def fit_batch(self: Any, batch: Any) -> Tensor:
    """Has two optimizers, like a GAN."""
    self.on_fit_batch_start(batch, True)
    for optimizer, sign in ((self.optimizer, 1), (self.other, -1)):
        predictions = self.compute_forward(batch, None)
        loss = self.compute_objectives(predictions, batch, OURS.Stage.TRAIN)
        (sign * loss).backward()
        optimizer.step()
        self.modules.zero_grad()
    self.on_fit_batch_end(batch, None, loss, True)
    return loss.detach().cpu()


def init_optimizers(self: Any) -> None:
    self.optimizer = torch.optim.Adam(self.modules.encoder.parameters(), lr=0.01)
    self.other = torch.optim.SGD(self.modules.head.parameters(), lr=0.02, momentum=0.9)
    self.optimizers_dict = {"one": self.optimizer, "other": self.other}


GAN = {"fit_batch": fit_batch, "init_optimizers": init_optimizers}


def make(folder: Path, side: Side = OURS, **hooks: Any) -> Any:
    seed_everything(3)
    counter = side.EpochCounter(2)
    modules = two_modules(dropout=0.2)
    recoverables = {"counter": counter, **modules}
    hparams = {
        "annealing": Annealing(),
        "train_logger": TrainLogger(folder / "train_log.txt"),
        "loggers": [None, TrainLogger(folder / "another_log.txt")],
        "counter": counter,
        "lr": 1,
    }
    return classifier(side, **{**HOOKS, "error": None, "memory": MEMORY, **hooks})(
        modules, lambda parameters: torch.optim.Adam(parameters, lr=0.01), hparams,
        {"device": "cpu", "noprogressbar": True, "distributed_backend": "gloo"},
        Checkpointer(folder / "save", recoverables),
    )  # fmt: skip


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    data, generator = dataset(ITEMS), torch.Generator().manual_seed(1)
    sampler = RandomSampler(data, generator=generator)
    return DataLoader(data, batch_size=4, sampler=sampler), DataLoader(data, batch_size=8)


def everything(brain: Any, folder: Path, loader: Any) -> dict[str, Any]:
    """Returns all state that a trial may change, and the files in a folder."""
    optimizers = [brain.optimizer, getattr(brain, "other", None)]
    kinds = (int, float, dict, list, np.ndarray)
    own = {n: v for n, v in vars(brain).items() if isinstance(v, kinds)}
    del own["optimizers_dict"]
    return {
        "modules": _plain(dict(brain.modules.state_dict())),
        "gradients": [_plain(p.grad) for p in brain.modules.parameters()],
        "modes": [m.training for m in brain.modules.modules()],
        "optimizers": [_plain(each.state_dict()) for each in optimizers if each is not None],
        "brain": _plain(own),
        "annealing": _plain(vars(brain.hparams.annealing)),
        "logged": brain.hparams.train_logger.lines,
        "counter": brain.hparams.counter.current,
        "generator": _plain(loader.sampler.generator.get_state()),
        "random": _plain([torch.get_rng_state(), random.getstate(), np.random.get_state()]),
        "files": {str(p): p.read_bytes() for p in sorted(folder.rglob("*.*")) if p.is_file()},
        "size": loader.batch_size,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, Tensor):
        return local(value.detach()).tolist()
    return value.tolist() if isinstance(value, np.ndarray) else value


class Watched:
    """Records the state before and after a search, also if it raises."""

    def __init__(self, module: Any, brain: Any, folder: Path, loader: Any) -> None:
        self._find, self._arguments = module.find, (brain, folder, loader)
        self.before: list[Any] = []
        self.after: list[Any] = []
        self.found: list[Any] = []

    def __call__(self, *args: Any) -> Any:
        self.before.append(everything(*self._arguments))
        try:
            self.found.append(self._find(*args))
            return self.found[-1]
        finally:
            self.after.append(everything(*self._arguments))


SEARCHES = {
    "rate": (learning_rate, lambda: LearningRateFinder(1e-4, num_training_steps=25)),
    "size": (batch_size, lambda: BatchSizeFinder(init_val=4, steps_per_trial=2)),
}


def search(
    folder: Path,
    kind: str,
    side: Side = OURS,
    error: BaseException | None = None,
    strategy: str = "auto",
    **hooks: Any,
) -> tuple[Any, Watched, BaseException | None]:
    """Trains an epoch, then starts a fit that searches and may raise an error.

    Returns:
        The Brain, the recorded states, and the error of the fit.
    """
    brain, (train, valid) = make(folder, side, **hooks), loaders()
    options: dict[str, Any] = {
        "enable_checkpointing": False, "devices": world_size(), "strategy": strategy
    }  # fmt: skip
    trainer_with(max_epochs=1, **options).fit(to_lightning(brain), train, valid)
    module, make_finder = SEARCHES[kind]
    finder, watched = make_finder(), Watched(module, brain, folder, train)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as restores:
        patch.setattr(module, "find", watched)
        # After a Ctrl-C Lightning ignores another one.
        restores.callback(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))
        brain.error = error
        try:
            again = trainer_with(finder, max_epochs=1, **options)
            again.fit(to_lightning(brain), train, valid)
        except BaseException as raised:  # noqa: BLE001  also KeyboardInterrupt
            return brain, watched, raised
    return brain, watched, None
