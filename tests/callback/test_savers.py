"""Detects which code may save, and skips records that are not needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from torch.utils.data import DataLoader

from brain_lightning import Checkpointer
from brain_lightning.callback.savers import saves_between_batches, saves_within_batch
from brain_lightning.resume import before_batch, data_position
from tests.support.brains import Regression, loader, make, trainer_with
from tests.support.resuming import BATCHES, StatefulStream, brain_in
from tests.support.upstream import needs_lightning

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

# ----------------------------------------------------------------- by the Trainer's callbacks


class AtBatches(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step < 0:
            trainer.save_checkpoint("never")


class AtStarts(Callback):
    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step < 0:
            trainer.save_checkpoint("never")


class InSteps(Callback):
    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        self.keep(trainer)

    def keep(self, trainer: Any) -> None:
        if trainer.global_step < 0:
            trainer.save_checkpoint("never")


class Looks(Callback):
    """Overrides step hooks, but does not save in them."""

    def on_before_optimizer_step(self, *_: Any) -> None: ...

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step < 0:
            trainer.save_checkpoint("never")


class AtEpochs(Callback):
    def on_train_epoch_end(self, *_: Any) -> None: ...


def save_on_exception(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_on_exception=True)


# Creates the callback; whether it may save between batches, and within batches.
CALLBACKS: list[Any] = [
    pytest.param(lambda _: (), False, False, id="none"),
    pytest.param(lambda path: [ModelCheckpoint(path)], False, False, id="ModelCheckpoint"),
    pytest.param(
        lambda path: [ModelCheckpoint(path, every_n_train_steps=1)],
        False,
        False,
        id="ModelCheckpoint at steps",
    ),
    pytest.param(lambda _: [EarlyStopping("valid_loss")], False, False, id="EarlyStopping"),
    pytest.param(lambda _: [LearningRateMonitor("step")], False, False, id="rates"),
    pytest.param(lambda path: [OnExceptionCheckpoint(path)], False, True, id="on exception"),
    pytest.param(
        lambda path: [save_on_exception(path)],
        False,
        True,
        id="save_on_exception",
        marks=needs_lightning("2.5.4"),
    ),
    pytest.param(lambda _: [AtEpochs()], False, False, id="foreign, at epochs"),
    pytest.param(lambda _: [AtBatches()], True, False, id="foreign, at batches"),
    pytest.param(lambda _: [AtStarts()], True, False, id="foreign, at starts"),
    pytest.param(lambda _: [InSteps()], False, True, id="foreign, in steps"),
    pytest.param(lambda _: [Looks()], False, False, id="foreign, looks at steps"),
    pytest.param(
        lambda _: [LambdaCallback(on_before_backward=print)],
        False,
        False,
        id="Lightning's own",
    ),
]


@pytest.mark.parametrize(("callbacks", "between", "within"), CALLBACKS)
def test_callbacks_that_may_save(
    tmp_path: Path,
    callbacks: Callable[[Path], list[Callback]],
    between: bool,
    within: bool,
) -> None:
    trainer = trainer_with(*callbacks(tmp_path), enable_checkpointing=True)
    assert saves_between_batches(trainer) is between
    assert saves_within_batch(trainer, make()) is within


def test_a_callback_of_an_older_lightning_has_no_such_argument() -> None:
    callback = ModelCheckpoint()
    vars(callback).pop("save_on_exception", None)
    trainer = trainer_with(callback, enable_checkpointing=True)
    assert saves_within_batch(trainer, make()) is False


@pytest.mark.parametrize("interval", [3, 0.5])
def test_a_validation_in_the_middle_of_an_epoch_may_save(interval: float) -> None:
    assert saves_between_batches(trainer_with(val_check_interval=interval))


# ----------------------------------------------------------------------- by a recipe's code


class InForward(Regression):
    def compute_forward(self, batch: Any, stage: Any) -> Any:
        if self.step == 3:
            self.checkpointer.save_checkpoint()
        return super().compute_forward(batch, stage)


class InNested(Regression):
    def on_fit_batch_end(self, *args: Any) -> None:
        def save() -> Any:
            return [(lambda: self.checkpointer)() for _ in range(1)]

        save()


class ByName(Regression):
    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        self.hparams.saver.save_and_keep_only()
        return super().compute_objectives(predictions, batch, stage)


class InHelper(Regression):
    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        self.keep()

    def keep(self) -> None:
        self.checkpointer.save_checkpoint()


class InHelperOfTheEnd(Regression):
    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        self.keep()

    def keep(self) -> None:
        self.checkpointer.save_checkpoint()


class Inherits(InForward):
    pass


class Decorated(Regression):
    @torch.enable_grad()
    def compute_forward(self, batch: Any, stage: Any) -> Any:
        self.checkpointer.save_checkpoint()
        return super().compute_forward(batch, stage)


class Static(Regression):
    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        self.keep(self)

    @staticmethod
    def keep(brain: Any) -> None:
        brain.checkpointer.save_checkpoint()


class AtEnds(Regression):
    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        self.checkpointer.save_and_keep_only()

    def on_evaluate_start(self, max_key: Any = None, min_key: Any = None) -> None:
        self.checkpointer.recover_if_possible()


RECIPES = {
    Regression: False, InForward: True, InNested: True, ByName: True, InHelper: True,
    Inherits: True, Decorated: True, Static: True, AtEnds: False,
    InHelperOfTheEnd: False,
}  # fmt: skip


@pytest.mark.parametrize(("cls", "within"), RECIPES.items())
def test_recipes_that_may_save(tmp_path: Path, cls: type[Regression], within: bool) -> None:
    brain = make(cls, checkpointer=Checkpointer(tmp_path))
    assert saves_within_batch(trainer_with(), brain) is within


def test_a_method_of_one_brain_alone_is_read_too(tmp_path: Path) -> None:
    brain = make(checkpointer=Checkpointer(tmp_path))
    assert saves_within_batch(trainer_with(), brain) is False
    brain.on_fit_batch_end = lambda *_: brain.checkpointer
    assert saves_within_batch(trainer_with(), brain) is True


# ---------------------------------------------------------- no records if nothing may save


class Calls:
    """Counts the calls of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.count = function, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self.function(*args, **kwargs)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Counts the random states that are recorded around batches."""
    calls = Calls(data_position.random_state)
    for module in (data_position, before_batch):
        monkeypatch.setattr(module, "random_state", calls)
    return calls


class LoadingState(StatefulStream):
    """Counts the calls of its state_dict."""

    asked = 0

    def state_dict(self) -> dict[str, Any]:
        self.asked += 1
        return super().state_dict()


def fit_counted(*callbacks: Callback, folder: Path | None = None, **trainer: Any) -> int:
    """Runs one epoch, and returns how often the state of its data was read."""
    data = LoadingState()
    brain = brain_in(folder, ckpt_interval_minutes=0)
    brain.hparams.epoch_counter.limit = 1
    arguments = {"callbacks": list(callbacks), **trainer}
    brain.fit(brain.hparams.epoch_counter, DataLoader(data, 4), loader(), trainer=arguments)
    assert brain.optimizer_step == BATCHES
    return data.asked


@pytest.mark.parametrize("has_folder", [False, True])
@pytest.mark.parametrize(
    "callbacks",
    [[], [EarlyStopping("valid_loss")], [AtEpochs()]],
    ids=["none", "own", "epochs"],
)
def test_nothing_is_noted_where_nobody_saves_in_an_epoch(
    tmp_path: Path, callbacks: list[Callback], has_folder: bool, drawn: Calls
) -> None:
    asked = fit_counted(*callbacks, folder=tmp_path if has_folder else None)
    # At the start of the training pass and of the validation pass.
    assert drawn.count < BATCHES
    assert asked < BATCHES


@pytest.mark.parametrize("callback", [AtBatches, AtStarts, InSteps])
def test_every_fetch_is_noted_where_somebody_may_save(
    callback: Callable[[], Callback], drawn: Calls
) -> None:
    asked = fit_counted(callback())
    assert drawn.count >= BATCHES
    assert asked >= BATCHES


def test_each_batch_is_noted_where_an_exception_saves(tmp_path: Path, drawn: Calls) -> None:
    fit_counted(AtEpochs())
    without = drawn.count
    with pytest.warns(UserWarning, match="without a model|no last checkpoint"):
        fit_counted(OnExceptionCheckpoint(tmp_path))
    # Before a batch is fetched, and before it is fitted.
    assert drawn.count - 2 * without >= 2 * BATCHES
