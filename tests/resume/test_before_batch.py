"""After an error in the middle of a batch, a run resumes before the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from brain_lightning import EpochCounter, to_lightning
from brain_lightning.resume import before_batch
from tests.support.brains import loader, make, same_state, trainer_with
from tests.support.resuming import BATCHES, Cut, Noise, Noisy, assert_same, at, brain_in, seed
from tests.support.upstream import weights_only

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings(r"ignore:.*fit\(ckpt_path=None\)` was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]


class Failing(torch.optim.SGD):
    """Fails in a given step: in the middle of it, or after the step and the scaler update."""

    steps = 0
    fails_at: int | None = None
    fails_in = "step"

    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            closure()
        self.steps += 1
        if self.steps == self.fails_at and self.fails_in == "step":
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1)
            raise Cut
        return super().step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.steps == self.fails_at and self.fails_in == "zero_grad":
            raise Cut
        super().zero_grad(set_to_none)


class Normed(Noisy):
    """Has buffers that the forward pass changes. Fails after the forward pass."""

    def compute_forward(self, batch: Any, stage: Any) -> Any:
        return self.modules.model(self.modules.norm(batch[0] + torch.randn(4, 4)))

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        if stage.name == "TRAIN" and self.cut is not None and self.cut(self):
            raise Cut
        return super().compute_objectives(predictions, batch, stage)


class Two(Normed):
    """Has two optimizers that step together. The second one fails."""

    fails_at: int | None = None
    fails_in = "step"

    def init_optimizers(self) -> None:
        model = self.modules.model
        self.first = torch.optim.Adam([model.weight, *self.modules.norm.parameters()], 0.01)
        self.second = Failing([model.bias], 0.1, momentum=0.9)
        self.second.fails_at, self.second.fails_in = self.fails_at, self.fails_in
        self.optimizers_dict = {"first": self.first, "second": self.second}


def brain_of(cls: type[Noisy], **options: Any) -> Any:
    hparams = {"epoch_counter": EpochCounter(2), "events": []}
    brain: Any = make(cls, hparams=hparams, **options)
    brain.modules["norm"] = nn.BatchNorm1d(4)
    seed(999)
    return brain


def fit(brain: Any, folder: Path, **arguments: Any) -> Any:
    """Saves a file if an error occurs. Resumes from this file if it exists."""
    trainer = trainer_with(
        OnExceptionCheckpoint(folder), max_epochs=-1, enable_checkpointing=True, **arguments
    )
    data = DataLoader(Noise(), 4, shuffle=True)
    trainer.fit(to_lightning(brain), data, loader(), ckpt_path="last", **weights_only(True))
    return brain


def whole_and_resumed(
    folder: Path, new: Callable[[], Any], failing: Callable[[Any], None]
) -> tuple[Any, Any]:
    whole = fit(new(), folder / "whole")
    first = new()
    failing(first)
    with pytest.raises(Cut):
        fit(first, folder / "cut")
    second = new()
    seed(77)
    resumed = fit(second, folder / "cut")
    assert_same(whole, resumed)
    assert same_state(whole.modules, resumed.modules)
    return whole, resumed


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_step_of_the_second_of_two_optimizers(
    tmp_path: Path, step: int, accumulation: int
) -> None:
    def fails(brain: Any) -> None:
        brain.fails_at = step

    def new() -> Any:
        return brain_of(Two, grad_accumulation_factor=accumulation)

    whole, resumed = whole_and_resumed(tmp_path, new, fails)
    assert whole.optimizer_step == 2 * BATCHES // accumulation
    for name in ("first", "second"):
        expected = getattr(whole, name).state_dict()["state"]
        found = getattr(resumed, name).state_dict()["state"]
        assert expected.keys() == found.keys() != set()
        for index, values in expected.items():
            for key, value in values.items():
                assert torch.equal(found[index][key], value), (name, key)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("cut", [at(1, 1), at(1, 5), at(2, 9)], ids=["1-1", "1-5", "2-9"])
def test_a_forward_pass_that_has_changed_buffers(
    tmp_path: Path, cut: Any, accumulation: int
) -> None:
    def fails(brain: Any) -> None:
        brain.cut = cut

    def new() -> Any:
        return brain_of(Normed, grad_accumulation_factor=accumulation)

    whole, _ = whole_and_resumed(tmp_path, new, fails)
    assert int(whole.modules.norm.num_batches_tracked) == 2 * BATCHES


class Scaled(Two):
    """Scales its loss. The scale grows, and shrinks if a gradient is infinite."""

    def on_fit_start(self) -> None:
        options = {"init_scale": 2.0**10, "growth_interval": 3}
        self.scaler = torch.GradScaler("cpu", **options)
        super().on_fit_start()

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        loss = super().compute_objectives(predictions, batch, stage)
        # The gradient overflows, but the loss does not.
        if (
            stage.name == "TRAIN"
            and self.hparams.epoch_counter.current == 1
            and self.step == 5
        ):
            loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss


@pytest.mark.parametrize("where", ["step", "zero_grad"])
@pytest.mark.parametrize("step", [3, 5, 9])
def test_the_state_of_the_scaler(tmp_path: Path, step: int, where: str) -> None:
    def fails(brain: Any) -> None:
        brain.fails_at, brain.fails_in = step, where

    whole, resumed = whole_and_resumed(tmp_path, lambda: brain_of(Scaled), fails)
    assert whole.scaler.get_scale() not in (1.0, 2.0**10)
    assert resumed.scaler.state_dict() == whole.scaler.state_dict()


# ------------------------------------------------------------------- where there is no copy

NO_MEMORY = "Out of memory for a copy"


def fails(*_: Any) -> Any:
    raise torch.OutOfMemoryError


@pytest.mark.parametrize(
    ("name", "value"), [("gradients", fails), ("copy", SimpleNamespace(deepcopy=fails))]
)
def test_without_memory_for_a_copy_training_goes_on(
    tmp_path: Path,
    name: str,
    value: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = fit(brain_of(Normed), tmp_path / "expected")
    assert NO_MEMORY not in caplog.text
    monkeypatch.setattr(before_batch, name, value)
    assert_same(expected, fit(brain_of(Normed), tmp_path / "found"))
    assert caplog.text.count(NO_MEMORY) == 1


def keep(brain: Any) -> None:
    """A save outside of any class: whether it saves within a batch is not known in advance."""
    brain.checkpointer.save_and_keep_only(end_of_epoch=False)


KEEPERS = {"keep": keep}
UNEXPECTED = "saved in the middle of a batch, where no save was expected"


@pytest.mark.parametrize("saves", [1, 2])
def test_a_save_that_nothing_expected_is_warned_of_once(
    tmp_path: Path, saves: int, caplog: pytest.LogCaptureFixture
) -> None:
    brain = brain_in(tmp_path, ckpt_interval_minutes=0)

    def forward(batch: Any, stage: Any) -> Any:
        if stage.name == "TRAIN" and brain.step in (3, 5)[:saves]:
            KEEPERS["keep"](brain)
        return type(brain).compute_forward(brain, batch, stage)

    brain.compute_forward = forward
    brain.hparams.epoch_counter.limit = 1
    brain.fit(brain.hparams.epoch_counter, DataLoader(Noise(), 4), loader())
    assert brain.optimizer_step == BATCHES
    assert caplog.text.count(UNEXPECTED) == 1


def test_a_save_that_was_expected_is_not_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    brain = brain_of(Normed)
    brain.cut = at(1, 5)
    with pytest.raises(Cut):
        fit(brain, tmp_path)
    assert (tmp_path / "on_exception.ckpt").exists()
    assert UNEXPECTED not in caplog.text
