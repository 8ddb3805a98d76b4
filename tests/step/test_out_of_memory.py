"""A batch for which there is no memory: it is named, skipped, or the run ends and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from speechbrain.dataio.batch import PaddedBatch
from torch import nn
from torch.utils.data import DataLoader

from brain_lightning import Checkpointer, EpochCounter, RunOptionError
from brain_lightning.step.out_of_memory import is_out_of_memory, notes
from tests.support.brains import Regression, all_equal, loader, make, weights
from tests.support.resuming import BATCHES, Noise, seed

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Full(nn.Module):
    """Has no memory in the forward or the backward pass, when it is told so."""

    forward_fails = backward_fails = False

    def forward(self, x: Any) -> Any:
        if self.forward_fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return _Backward.apply(x, self)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, full: Full) -> Any:
        ctx.full = full
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        if ctx.full.backward_fails:
            raise torch.OutOfMemoryError
        return gradient, None


class Stepping(torch.optim.Adam):
    """Fails in the middle of a step."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1)
            raise MemoryError
        return super().step(closure)


WHERE = ("on_fit_batch_start", "forward", "backward", "step", "on_fit_batch_end")


class Greedy(Regression):
    """Random, with buffers; fails once for each of ``failures``: (epoch, step) and where."""

    failures: tuple[tuple[int, int, str], ...] = ()

    def _fails(self, where: str) -> bool:
        now = (self.hparams.epoch_counter.current, self.step, where)
        return now in self.failures and self.modules.training

    def _fail(self, where: str) -> None:
        if self._fails(where):
            raise torch.OutOfMemoryError

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        self._fail("on_fit_batch_start")

    def compute_forward(self, batch: Any, stage: Any) -> Any:
        modules = self.modules
        modules.full.forward_fails = self._fails("forward")
        modules.full.backward_fails = self._fails("backward")
        # Its last layer has gradients when the backward pass of the others fails.
        first = nn.functional.dropout(modules.norm(batch[0]), 0.3, self.modules.training)
        self.seen = getattr(self, "seen", 0) + 1
        return modules.model(modules.full(modules.first(first)))

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        self.hparams.losses.append(self.step)
        if self.optimizer is not None:
            self.optimizer.fails = self._fails("step")
        return super().compute_objectives(predictions, batch, stage)

    def on_fit_batch_end(self, *_: Any) -> None:
        self.hparams.ended.append(self.step)
        self._fail("on_fit_batch_end")


class Losses(list):  # type: ignore[type-arg]
    """What a recipe counts in an epoch."""


class Around(Greedy):
    def fit_batch(self, batch: Any) -> Any:
        return super().fit_batch(batch)


class ByHand(Greedy):
    def fit_batch(self, batch: Any) -> Any:
        self.on_fit_batch_start(batch, True)
        stage = self._lightning.stage_type.TRAIN
        loss = self.compute_objectives(self.compute_forward(batch, stage), batch, stage)
        (loss / self.grad_accumulation_factor).backward()
        if self.step % self.grad_accumulation_factor == 0:
            self.optimizers_step()
        self.on_fit_batch_end()
        return loss.detach()


class Watching(Callback):
    """Has Lightning's own loop fit batches."""

    def on_before_backward(self, *args: Any) -> None:
        pass


def brain_of(cls: type[Greedy], folder: Path | None, *failures: Any, **options: Any) -> Any:
    counter = EpochCounter(2)
    hparams = {"epoch_counter": counter, "losses": Losses(), "ended": []}
    brain: Any = make(
        cls, lambda parameters: Stepping(parameters, 0.01), hparams=hparams, **options
    )
    parts = {"first": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4), "full": Full()}
    for name, part in parts.items():
        brain.modules[name] = part
    if folder is not None:
        brain.checkpointer = Checkpointer(folder, {"counter": counter})
        brain.checkpointer.add_recoverables({"modules": brain.modules, "brain": brain})
    brain.failures = failures
    seed(999)
    return brain


def fit(brain: Any, data: Any = None, **arguments: Any) -> Any:
    data = DataLoader(Noise(), 4, shuffle=True) if data is None else data
    brain.fit(brain.hparams.epoch_counter, data, loader(), **arguments)
    return brain


def state(brain: Any) -> list[Any]:
    optimizer = brain.optimizer.state_dict()["state"]
    values = [value for each in optimizer.values() for value in each.values()]
    return [*brain.modules.state_dict().values(), *values, torch.get_rng_state()]


def assert_same(one: Any, other: Any) -> None:
    assert all_equal(state(one), state(other))
    assert one.optimizer_step == other.optimizer_step
    assert not all_equal(weights(one), weights(brain_of(Greedy, None)))
