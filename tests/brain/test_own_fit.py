"""A custom loop on a Trainer: callbacks, loggers and limits work as with ``fit``."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from brain_lightning import Brain, EpochCounter, Stage, UnsupportedError, to_lightning
from tests.support.brains import Regression, all_equal, loader, make, trainer_with, weights

# Lightning's callbacks warn about a missing metric.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Trace(Callback):
    """Records every hook, with the Trainer's counters and metrics."""

    def __init__(self) -> None:
        self.events: list[Any] = []


def _traced(hook: str) -> Any:
    def heard(self: Trace, trainer: Any, *_: Any, **__: Any) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        loggers_step = trainer.fit_loop.epoch_loop._batches_that_stepped
        counts = (trainer.current_epoch, trainer.global_step, loggers_step)
        self.events.append((hook, *counts, metrics))

    return heard


for name in dir(Callback):
    if name.startswith("on_") and "checkpoint" not in name and name != "on_exception":
        setattr(Trace, name, _traced(name))


class OwnFit(Regression):
    """A copy of SpeechBrain's fit."""

    def fit(self, epoch_counter: Any, train_set: Any, valid_set: Any = None) -> str:  # type: ignore[override]
        self.on_fit_start()
        for epoch in epoch_counter:
            self._fit_train(train_set=train_set, epoch=epoch, enable=False)
            self._fit_valid(valid_set=valid_set, epoch=epoch, enable=False)
        return "own"


class Parts(Regression):
    """Overrides both parts of fit, and only calls super()."""

    def _fit_train(self, train_set: Any, epoch: Any, enable: bool) -> None:
        super()._fit_train(train_set, epoch, enable)

    def _fit_valid(self, valid_set: Any, epoch: Any, enable: bool) -> None:
        super()._fit_valid(valid_set, epoch, enable)


def train(folder: Path, brain_class: type[Brain], valid: bool, **arguments: Any) -> Any:
    """Returns the events, files, logs, hook calls and weights of a run."""
    trace, brain, counter = Trace(), make(brain_class), EpochCounter(4)
    monitor = "valid_loss" if valid else "train_loss"
    best = ModelCheckpoint(folder / "best", monitor=monitor, save_top_k=-1)
    stopping = [EarlyStopping(**each) for each in arguments.pop("stopping", ())]
    callbacks = [trace, best, *stopping]
    trainer = {"callbacks": callbacks, "logger": CSVLogger(folder, "csv", ""), **arguments}
    brain.fit(counter, loader(), loader(8) if valid else None, trainer=trainer)
    files = sorted(path.name for path in (folder / "best").glob("*"))
    csv = [path.read_text() for path in folder.rglob("metrics.csv")]
    hooks = getattr(brain, "events", [])
    return (trace.events, files, csv, hooks, counter.current), weights(brain)


def assert_same_runs(folder: Path, brain_class: type[Brain], **setting: Any) -> None:
    expected, learned = train(folder / "fit", Regression, **setting)
    found, learned_here = train(folder / "own", brain_class, **setting)
    for mine, other in zip(found, expected, strict=True):
        assert mine == other
    assert all_equal(learned_here, learned)


@pytest.mark.parametrize("brain_class", [Parts, OwnFit])
@pytest.mark.parametrize(
    "arguments",
    [
        {}, {"max_steps": 7}, {"max_epochs": 2}, {"limit_train_batches": 3}, {"max_steps": 0},
        {"limit_val_batches": 0}, {"log_every_n_steps": 2},
        {"fast_dev_run": True}, {"overfit_batches": 2}, {"accumulate_grad_batches": 2},
        {"stopping": [{"monitor": "valid_loss", "patience": 1, "min_delta": 10.0}]},
        {"stopping": [{"monitor": "train_loss", "patience": 0, "min_delta": 10.0,
                       "check_on_train_epoch_end": False}]},
        {"valid": False},
    ],
    ids=str,
)  # fmt: skip
def test_the_trainer_sees_what_it_sees_of_fit(
    brain_class: type[Brain], arguments: dict[str, Any], tmp_path: Path
) -> None:
    assert_same_runs(tmp_path, brain_class, **{"valid": True, **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        {"val_check_interval": 2}, {"check_val_every_n_epoch": 2},
        {"val_check_interval": 3, "check_val_every_n_epoch": None},
        {"val_check_interval": 0.5, "max_steps": 7}, {"reload_dataloaders_every_n_epochs": 1},
    ],
    ids=str,
)  # fmt: skip
def test_the_trainer_validates_by_the_parts(arguments: dict[str, Any], tmp_path: Path) -> None:
    assert_same_runs(tmp_path, Parts, valid=True, **arguments)
    if "reload_dataloaders_every_n_epochs" not in arguments:
        with pytest.raises(UnsupportedError, match=f"{next(iter(arguments))}=.*OwnFit"):
            make(OwnFit).fit(range(1), loader(), loader(), trainer=arguments)


def test_a_trainer_of_ones_own_runs_the_recipes_fit_and_is_left_as_it_was() -> None:
    brain, other, trace = make(OwnFit), make(), Trace()
    trainer = trainer_with(trace)
    assert brain.fit(range(1, 9), loader(), loader(8), trainer=trainer) == "own"
    trainer_with().fit(to_lightning(other, epoch_counter=range(1, 9)), loader(), loader(8))
    assert all_equal(weights(brain), weights(other))
    assert brain.events == other.events
    assert trainer.callbacks == [trace]
    assert not {"fit", "on_fit_start", "_fit_train", "_fit_valid"} & vars(brain).keys()


def test_to_lightning_never_leaves_out_the_recipes_fit() -> None:
    brain = make(OwnFit)
    with pytest.raises(UnsupportedError, match=r"OwnFit overrides fit.*brain\.fit"):
        trainer_with().fit(to_lightning(brain), loader())
    # This method does not concern fit.
    trainer_with().test(to_lightning(brain), loader(), verbose=False)
    assert [event[1] for event in brain.events] == ["TEST", "TEST"]


class Anew(Regression):
    """Overrides both parts with custom loops; the validation has a custom loss."""

    def _fit_train(self, train_set: Any, epoch: Any, enable: bool) -> None:
        self.on_stage_start(Stage.TRAIN, epoch)
        self.modules.train()
        for batch in train_set:
            self.step += 1
            self.fit_batch(batch)
        self.on_stage_end(Stage.TRAIN, 0.5, epoch)
        self.step = 0

    def _fit_valid(self, valid_set: Any, epoch: Any, enable: bool) -> None:
        self.on_stage_start(Stage.VALID, epoch)
        self.on_stage_end(Stage.VALID, stage_loss=torch.tensor(10.0 - epoch), epoch=epoch)


def test_parts_written_anew_have_metrics_steps_and_callbacks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    trace, brain = Trace(), make(Anew)
    stopping = EarlyStopping("valid_loss", min_delta=5.0, patience=2)
    folder, name = tmp_path / "best", "{epoch}-{valid_loss}"
    best = ModelCheckpoint(folder, monitor="valid_loss", filename=name)
    logger = CSVLogger(tmp_path, "csv", "")
    trainer = {"callbacks": [trace, stopping, best], "logger": logger}
    brain.fit(EpochCounter(9), loader(), trainer=trainer)
    assert stopping.stopped_epoch == 2
    assert [path.name for path in folder.glob("*")] == ["epoch=2-valid_loss=7.0.ckpt"]
    heard = [(hook, steps) for hook, _, steps, *_ in trace.events if "epoch_start" in hook]
    assert heard == [
        ("on_train_epoch_start", 0), ("on_validation_epoch_start", 5),
        ("on_train_epoch_start", 5), ("on_validation_epoch_start", 10),
        ("on_train_epoch_start", 10), ("on_validation_epoch_start", 15),
    ]  # fmt: skip
    rows = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    assert rows[0] == "epoch,loss,step,train_loss,valid_loss"
    assert rows[1:] == [
        "0,9.0,4,0.5,9.0", "1,8.0,9,0.5,8.0", "2,7.0,14,0.5,7.0",
    ]  # fmt: skip
    for part in ("_fit_train", "_fit_valid"):
        assert f"Anew.{part} is a custom loop. Limits" in caplog.text


def test_what_comes_after_the_end_is_left_out_in_words(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Endless(Regression):
        def fit(self, train_set: Any) -> None:  # type: ignore[override]
            self.on_fit_start()
            for epoch in range(1, 4):
                self._fit_train(train_set, epoch, False)
                self._fit_valid(train_set, epoch, False)

    brain = make(Endless)
    brain.fit(loader(), trainer={"limit_train_batches": 0})
    assert not brain.optimizer_step
    assert not hasattr(brain, "events")
    brain.fit(loader(), trainer={"max_steps": 7})
    assert brain.optimizer_step == 7
    assert [event[1:] for event in brain.events if event[0] == "start"] == [
        ("TRAIN", 1), ("VALID", 1), ("TRAIN", 2), ("VALID", 2),
    ]  # fmt: skip
    for part in ("_fit_train", "_fit_valid"):
        assert f"The Trainer has ended the training. {part} of epoch 3" in caplog.text


def test_a_whole_loop_runs_as_it_is_written_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Whole(Regression):
        def fit(self, batches: Any) -> None:  # type: ignore[override]
            self.on_fit_start()
            for batch in batches:
                self.step += 1
                self.fit_batch(batch)

    brain = make(Whole)
    brain.fit(loader(), trainer={"max_steps": 2})
    assert brain.optimizer_step == 5
    assert "Whole.fit is a custom loop that calls neither _fit_train" in caplog.text


def test_a_fit_around_speechbrains_has_the_trainer_that_it_is_given() -> None:
    class Around(Regression):
        def fit(self, *args: Any, **kwargs: Any) -> None:
            self.events = ["before"]
            super().fit(*args, **kwargs)

    brain = make(Around)
    brain.fit(range(9), loader(), trainer={"max_steps": 2})
    assert brain.optimizer_step == 2
    assert brain.events[0] == "before"


@pytest.mark.parametrize("where", ["_fit_train", "_fit_valid", "between"])
def test_an_error_in_a_loop_of_ones_own_leaves_everything_as_it_was(where: str) -> None:
    class Fails(OwnFit):
        def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
            if (stage.name, where) in (("TRAIN", "_fit_train"), ("VALID", "_fit_valid")):
                raise KeyError("oh")

        def _fit_valid(self, valid_set: Any, epoch: Any, enable: bool) -> None:
            super()._fit_valid(valid_set, epoch, enable)
            if where == "between":
                raise KeyError("oh")

    brain = make(Fails)
    trainer = trainer_with()
    loops = [type(loop) for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop)]
    with pytest.raises(KeyError, match="oh"):
        brain.fit(range(2), loader(), loader(), trainer=trainer)
    assert [type(loop) for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop)] == loops
    assert (
        not {"on_fit_start", "_fit_train", "_fit_valid", "on_stage_end"} & vars(brain).keys()
    )
    Fails.on_stage_start = Regression.on_stage_start  # type: ignore[method-assign]
    Fails._fit_valid = Regression._fit_valid  # type: ignore[method-assign]
    before = weights(brain)
    brain.fit(range(1), loader(), loader())
    assert not all_equal(before, weights(brain))


@pytest.mark.parametrize("arguments", [{"max_steps": 7}, {"max_epochs": 2}], ids=str)
def test_a_loop_without_an_end_ends_with_the_trainer(
    arguments: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    class Endless(Regression):
        def fit(self, train_set: Any) -> None:  # type: ignore[override]
            self.on_fit_start()
            epoch = 0
            while self.optimizer_step < 100:
                epoch += 1
                self._fit_train(train_set, epoch, False)

    brain = make(Endless)
    brain.fit(loader(), trainer=arguments)
    assert brain.optimizer_step == arguments.get("max_steps", 10)
    assert caplog.text.count("The Trainer has ended the training") == 1
    assert "The custom loop of Endless.fit continues after the training" in caplog.text


def test_the_epoch_counter_of_a_fit_is_the_recipes() -> None:
    class Reads(OwnFit):
        def fit(self, epoch_counter: Any, *args: Any, **kwargs: Any) -> Any:
            self.read = isinstance(epoch_counter, EpochCounter), epoch_counter == [4, 5]
            self.copied = copy.deepcopy(epoch_counter)
            return super().fit(epoch_counter, *args, **kwargs)

    brain, counter = make(Reads), EpochCounter(9)
    brain.fit(counter, loader(), trainer={"max_steps": 7})
    assert brain.read == (True, False)
    assert (counter.current, type(counter)) == (2, EpochCounter)
    assert list(brain.copied) == list(range(1, 10))
    brain.fit([4, 5], loader())
    assert brain.read == (False, True)
    assert [event[2] for event in brain.events[-4:]] == [4, 4, 5, 5]


@pytest.mark.parametrize("name", ["limit_val_batches", "overfit_batches"])
def test_fractions_are_of_the_sets_of_the_parts(name: str) -> None:
    class Counts(OwnFit):
        batches = 0

        def evaluate_batch(self, batch: Any, stage: Any) -> Any:
            self.batches += 1
            return super().evaluate_batch(batch, stage)

    brain = make(Counts)
    brain.fit(range(1), loader(), loader(), trainer={name: 0.4})
    assert brain.batches == 2


def test_parts_that_a_script_calls_share_the_limits_of_one_trainer() -> None:
    brain = make(hparams={"trainer": {"max_steps": 7}})
    brain.on_fit_start()
    for epoch in range(1, 4):
        brain._fit_train(loader(), epoch, False)
        brain._fit_valid(loader(8), epoch, False)
    assert brain.optimizer_step == 7
    assert [event[1:] for event in brain.events if event[0] == "start"][:4] == [
        ("TRAIN", 1), ("VALID", 1), ("TRAIN", 2), ("VALID", 2),
    ]  # fmt: skip
