"""The lean loops and Lightning's own loops: identical metrics, hooks and counters."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest
import speechbrain
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import (
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from brain_lightning import Brain, to_lightning
from brain_lightning.lightning_internals import attach
from brain_lightning.module.automatic import AutomaticModule
from brain_lightning.module.manual import ManualModule
from tests.support.brains import (
    Regression,
    all_equal,
    loader,
    make,
    sgd,
    trainer_with,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Dropping(Regression):
    """A Brain with random numbers in every step, which records its events."""

    def compute_forward(self, batch: Any, stage: Any) -> Tensor:
        self.events.append((stage.name, self.step, torch.is_grad_enabled()))
        return torch.nn.functional.dropout(super().compute_forward(batch, stage), 0.3)


class ByHand(Dropping):
    def fit_batch(self, batch: Any) -> Any:
        return super().fit_batch(batch)


class NeedsHooks(Callback):
    """Overrides hooks within a step, which only Lightning's own loop calls."""

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Nothing: that it is there is enough."""


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader()


def fit(cls: Any, **arguments: Any) -> tuple[Any, Any]:
    brain = make(cls, grad_accumulation_factor=2)
    torch.manual_seed(3)
    trainer = trainer_with(**arguments)
    trainer.fit(to_lightning(brain), loader(), loader())
    return brain, trainer


@pytest.fixture
def lean_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns the batches that the lean loop fitted."""
    seen: list[int] = []
    for cls in (AutomaticModule, ManualModule):
        original = cls.fit_batch

        def fit_batch(
            self: Any, batch: Any, batch_idx: int, original: Callable[..., Any] = original
        ) -> Any:
            seen.append(batch_idx)
            return original(self, batch, batch_idx)

        monkeypatch.setattr(cls, "fit_batch", fit_batch)
    return seen


@pytest.mark.parametrize(
    "arguments",
    [{"callbacks": [NeedsHooks()]}, {"profiler": "simple"}],
    ids=["a callback within the step", "a profiler"],
)
def test_where_a_hook_is_needed_the_loop_of_lightning_does_the_same(
    lean_steps: list[int], arguments: dict[str, Any]
) -> None:
    lean, lean_trainer = fit(Dropping)
    assert lean_steps == [0, 1, 2, 3, 4] * 2
    whole, trainer = fit(Dropping, **arguments)
    assert len(lean_steps) == 10
    assert all_equal(weights(lean), weights(whole))
    assert lean.events == whole.events
    assert not all_equal(weights(lean), weights(make(Dropping)))
    assert lean_trainer.global_step == trainer.global_step == 4
    assert lean_trainer.fit_loop.total_batch_idx == trainer.fit_loop.total_batch_idx == 9
    assert lean_trainer.callback_metrics == trainer.callback_metrics


def test_without_the_lean_loops_everything_is_the_same(
    lean_steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lean, _ = fit(Dropping)
    monkeypatch.setattr(attach, "make_lean", lambda loops, temporary: None)
    brain, _ = fit(Dropping)
    assert len(lean_steps) == 10
    assert all_equal(weights(lean), weights(brain))
    assert lean.events == brain.events


def test_a_recipe_that_steps_by_hand_is_lean_with_such_callbacks_too(
    lean_steps: list[int],
) -> None:
    lean, _ = fit(ByHand)
    watched, _ = fit(ByHand, callbacks=[NeedsHooks()])
    assert len(lean_steps) == 20
    assert all_equal(weights(lean), weights(watched))


@pytest.mark.filterwarnings("ignore:You have overridden `transfer_batch_to_device`")
def test_a_data_module_moves_its_batches_itself(lean_steps: list[int]) -> None:
    lean, _ = fit(Dropping)
    brain = make(Dropping, grad_accumulation_factor=2)
    torch.manual_seed(3)
    trainer_with().fit(to_lightning(brain), datamodule=Data())
    assert len(lean_steps) == 10
    assert all_equal(weights(lean), weights(brain))


def test_who_looks_at_batches_sees_them(lean_steps: list[int], tmp_path: Any) -> None:
    seen: list[Any] = []

    class Watches(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append(("start", args[1], len(pl_module.brain.events)))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            outputs, _, index = args
            seen.append(("end", index, float(outputs["loss"]), trainer.global_step))
            pl_module.log("seen", float(index), on_step=True, on_epoch=True)

        def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append(("valid", args[2]))

    logger = CSVLogger(tmp_path)
    callbacks = [Watches(), LearningRateMonitor("step")]
    _, trainer = fit(Dropping, callbacks=callbacks, logger=logger, log_every_n_steps=1)
    assert len(lean_steps) == 10
    assert [each[:2] for each in seen[:4]] == [
        ("start", 0),
        ("end", 0),
        ("start", 1),
        ("end", 1),
    ]
    assert sum(each[0] == "valid" for each in seen) == 10
    assert float(trainer.callback_metrics["seen_epoch"]) == 2.0
    logger.save()
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "seen_step" in text
    assert "lr-" in text


def test_a_hook_of_one_instance_is_called(lean_steps: list[int]) -> None:
    called: list[int] = []
    callback = LambdaCallback(on_before_zero_grad=lambda *_: called.append(1))
    fit(Dropping, callbacks=[callback])
    assert not lean_steps
    assert len(called) == 10


def test_validations_and_tests_are_the_same(lean_steps: list[int]) -> None:
    class Watches(Callback):
        def on_test_batch_end(self, *_: Any) -> None:
            """Nothing: that it is there is enough."""

    brain = make(Dropping)
    results = []
    for callbacks in ([], [Watches()]):
        torch.manual_seed(1)
        trainer = trainer_with(*callbacks)
        results.append(trainer.test(to_lightning(brain), loader(), verbose=False))
        results.append([event[:2] for event in brain.events])
        brain.events.clear()
    assert results[:2] == results[2:]
    assert len(results[1]) == 2 + 5


def test_a_scheduler_that_a_callback_brings_is_stepped(lean_steps: list[int]) -> None:
    """StochasticWeightAveraging adds its own scheduler, which must be stepped."""
    rates: dict[bool, list[float]] = {}
    for watched in (False, True):
        averaging = StochasticWeightAveraging(
            swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=3
        )
        found: list[float] = []
        rates[watched] = found

        class Rates(Callback):
            def on_train_epoch_end(
                self, trainer: Any, pl_module: Any, found: list[float] = found
            ) -> None:
                found.append(trainer.optimizers[0].param_groups[0]["lr"])

        callbacks = [averaging, Rates(), *([NeedsHooks()] if watched else [])]
        brain = make(Dropping)
        trainer_with(*callbacks, max_epochs=6).fit(to_lightning(brain), loader(), loader())
    assert rates[True] == rates[False]
    assert rates[True][-1] == pytest.approx(0.01)


@pytest.mark.parametrize("cls", [Dropping, ByHand])
def test_what_is_logged_before_a_step_is_logged(cls: Any) -> None:
    class Norms(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            pl_module.log("norm", 2.0, on_step=True, on_epoch=True)

    _, trainer = fit(cls, callbacks=[Norms()])
    assert float(trainer.callback_metrics["norm_epoch"]) == 2.0


def test_a_metric_that_nobody_reports_is_an_error(tmp_path: Any) -> None:
    saver = ModelCheckpoint(tmp_path / "checkpoints", monitor="typo")
    warns = pytest.warns(UserWarning, match="typo.*Available are train_loss")
    with warns, pytest.raises(MisconfigurationException, match="typo"):
        fit(Dropping, callbacks=[saver], enable_checkpointing=True)


def test_never_is_a_number_of_steps_to_log_at(tmp_path: Any) -> None:
    fit(Dropping, logger=CSVLogger(tmp_path), log_every_n_steps=0)


def test_sigterm_ends_a_test_within_a_batch() -> None:
    class Terminated(Dropping):
        def evaluate_batch(self, batch: Any, stage: Any) -> Any:
            signal.raise_signal(signal.SIGTERM)
            return super().evaluate_batch(batch, stage)

    brain = make(Terminated)
    with pytest.raises(SystemExit):
        trainer_with().test(to_lightning(brain), loader(), verbose=False)
    assert len([event for event in brain.events if event[0] == "TEST"]) == 1


def calls_of_a_batch(brain_class: Any, accumulation: int) -> int:
    """Counts calls of Python functions between two forward passes."""
    calls, seen = 0, []

    class Counting(brain_class):
        def compute_forward(self, batch: Any, stage: Any) -> Any:
            seen.append(calls)
            return self.modules.model(batch[0])

        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            return predictions.square().mean()

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    options = {"device": "cpu", "grad_accumulation_factor": accumulation}
    brain = Counting({"model": torch.nn.Linear(4, 1)}, sgd, run_opts=options)
    sys.setprofile(count)
    try:
        brain.fit(range(1), loader(24), progressbar=False)
    finally:
        sys.setprofile(None)
    # Later batches have the same number of calls.
    return seen[4] - seen[3]


@pytest.mark.parametrize("accumulation", [1, 6])
def test_a_batch_takes_few_calls_more_than_speechbrains(accumulation: int) -> None:
    ours = calls_of_a_batch(Brain, accumulation)
    # They cost less than what SpeechBrain does with tensors to check the loss twice.
    assert ours - calls_of_a_batch(speechbrain.Brain, accumulation) <= 80
