"""Counters and limits of a Trainer over several starts of a killed run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    Timer,
)
from speechbrain.utils import checkpoints
from torch.utils.data import DataLoader

from brain_lightning import Checkpointer, EpochCounter, to_lightning
from tests.support.brains import loader, make, trainer_with
from tests.support.resuming import BATCHES, Cut, Noise, Noisy, assert_same, seed
from tests.support.upstream import weights_only

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be"),
    pytest.mark.filterwarnings("ignore:You have overridden `transfer_batch_to_device`"),
    pytest.mark.filterwarnings("ignore:When using .Trainer.accumulate_grad_batches != 1"),
]

# brain_lightning's Checkpointer, SpeechBrain's Checkpointer, or ModelCheckpoint.
KINDS = ("ours", "speechbrain", "files")


class Saving(Noisy):
    """Steps a scheduler at the end of each epoch, and saves in a given stage."""

    def init_optimizers(self) -> None:
        super().init_optimizers()
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.7)
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("scheduler", self.scheduler)

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        super().on_stage_end(stage, stage_loss, epoch)
        if stage.name == self.hparams.saves_at:
            self.scheduler.step()
            if self.checkpointer is not None:
                self.checkpointer.save_and_keep_only(meta={"loss": stage_loss})


def brain_of(kind: str, folder: Path, saves_at: str = "VALID", **options: Any) -> Noisy:
    counter = EpochCounter(3)
    makes = {"ours": Checkpointer, "speechbrain": checkpoints.Checkpointer}
    checkpointer = makes[kind](folder, {"counter": counter}) if kind in makes else None
    hparams = {"epoch_counter": counter, "events": [], "saves_at": saves_at}
    run_opts = {"ckpt_interval_minutes": 0, **options}
    brain: Noisy = make(Saving, hparams=hparams, checkpointer=checkpointer, **run_opts)
    seed(999)
    return brain


def run(
    kind: str,
    folder: Path,
    *callbacks: Callback,
    saves_at: str = "VALID",
    options: dict[str, Any] | None = None,
    **trainer: Any,
) -> Noisy:
    """Starts a run, resuming from the checkpoints in the folder."""
    brain = brain_of(kind, folder, saves_at, **(options or {}))
    data = DataLoader(Noise(), 4, shuffle=True)
    valid = loader() if saves_at == "VALID" else None
    if kind != "files":
        arguments = {"callbacks": list(callbacks), **trainer}
        brain.fit(brain.hparams.epoch_counter, data, valid, trainer=arguments)
        return brain
    saver = ModelCheckpoint(folder, save_last=True)
    arguments = {"enable_checkpointing": True, "max_epochs": -1, **trainer}
    last = "last" if list(folder.glob("*.ckpt")) else None
    trains = trainer_with(*callbacks, saver, **arguments)
    trains.fit(to_lightning(brain), data, valid, ckpt_path=last, **weights_only(True))
    return brain


def batches(brain: Noisy) -> list[int]:
    return [event[1] for event in brain.hparams.events if event[0] == "batch"]


def stages(brain: Noisy) -> list[tuple[Any, ...]]:
    return [event for event in brain.hparams.events if event[0] != "batch"]


# ------------------------------------------------------------------- epochs after kills


class Watch(Callback):
    """Records the epochs of the recipe and of the Trainer, and kills the run in an epoch."""

    def __init__(self, kill: int | None) -> None:
        self.kill = kill
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        epoch = module.brain.hparams.epoch_counter.current
        self.seen.append((epoch, trainer.current_epoch + 1))
        if epoch == self.kill:
            raise Cut


def kill_in(epoch: int, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(Cut):
        run(*args, Watch(epoch), **kwargs)


@pytest.mark.parametrize("saves_at", ["VALID", "TRAIN"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_epochs_are_counted_over_kills(tmp_path: Path, kind: str, saves_at: str) -> None:
    """PL#4176, #4265: ``max_epochs`` and callbacks count correctly over several kills."""

    def scheduled() -> list[Callback]:
        return [GradientAccumulationScheduler({0: 1, 2: 3})]

    arguments: dict[str, Any] = {"saves_at": saves_at, "max_epochs": 3}
    whole = run(kind, tmp_path / "whole", *scheduled(), **arguments)
    for epoch in (2, 3):
        kill_in(epoch, kind, tmp_path / "cut", *scheduled(), **arguments)
    watch = Watch(None)
    resumed = run(kind, tmp_path / "cut", *scheduled(), watch, **arguments)
    assert watch.seen == [(3, 3)] * BATCHES
    assert whole.optimizer_step == 2 * BATCHES + BATCHES // 3
    assert_same(whole, resumed)


# ----------------------------------------------------------------------- reloaded loaders


class Data(LightningDataModule):
    """Records the epochs in which its loaders are created."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, int]] = []

    def _note(self, name: str) -> None:
        assert self.trainer is not None
        self.made.append((name, self.trainer.current_epoch))

    def train_dataloader(self) -> DataLoader[Any]:
        self._note("train")
        return DataLoader(Noise(), 4, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        self._note("valid")
        return loader()


def made(kind: str, folder: Path, kill: Any = None, epochs: int = 5) -> tuple[Noisy, Data]:
    brain, data = brain_of(kind, folder, ckpt_interval_steps=5), Data()
    brain.hparams.epoch_counter.limit = epochs
    saver = ModelCheckpoint(folder, save_last=True, every_n_train_steps=5)
    savers = [saver] if kind == "files" else []
    brain.cut = kill
    trainer = trainer_with(
        *savers,
        max_epochs=-1,
        reload_dataloaders_every_n_epochs=2,
        enable_checkpointing=bool(savers),
    )
    path = "last" if list(folder.glob("*.ckpt")) else None
    try:
        trainer.fit(to_lightning(brain), datamodule=data, ckpt_path=path, **weights_only(True))
    except Cut:
        assert kill is not None
    return brain, data


@pytest.mark.parametrize(("epoch", "step"), [(2, 8), (4, 9)], ids=["2-8", "4-9"])
@pytest.mark.parametrize("kind", KINDS)
def test_loaders_are_made_in_the_epochs_in_which_they_would_have_been(
    tmp_path: Path, kind: str, epoch: int, step: int
) -> None:
    def kill(brain: Noisy) -> bool:
        return brain.hparams.epoch_counter.current == epoch and brain.step == step

    whole, expected = made(kind, tmp_path / "whole")
    made(kind, tmp_path / "cut", kill)
    resumed, found = made(kind, tmp_path / "cut")
    assert expected.made == [
        (name, made_in) for made_in in (0, 2, 4) for name in ("train", "valid")
    ]
    # Those with which a process begins, and then as if it had not: for the validation it is
    # that of the epoch in which the run was killed, too.
    later = [each for each in expected.made if each[1] >= epoch - (each[0] == "valid")]
    assert [name for name, _ in found.made[:2]] == ["train", "valid"]
    assert found.made[2:] == later
    assert_same(whole, resumed)


# ------------------------------------------------------------------- limits within epochs


class Stops(Callback):
    """Stops the run after a number of batches in this process."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.left -= 1
        trainer.should_stop |= not self.left


class Ticks(Callback):
    """Advances the clock by one second in each batch."""

    def __init__(self, clock: SimpleNamespace) -> None:
        self.clock = clock

    def on_train_batch_start(self, *_: Any) -> None:
        self.clock.now += 1


def limit(name: str, count: int, clock: SimpleNamespace) -> tuple[list[Callback], Any]:
    """Returns callbacks and arguments that limit the number of batches."""
    if name == "max_steps":
        return [], {"max_steps": count}
    if name == "max_time":
        return [Ticks(clock)], {"max_time": {"seconds": count}}
    return [Stops(count)], {}


LIMITS = ("max_steps", "max_time", "should_stop")


# With SpeechBrain's Checkpointer, saving in every second step would take seconds.
SAVED = [
    (kind, name, steps)
    for kind in KINDS
    for name in LIMITS
    for steps in (0, 2)
    if not steps or kind != "speechbrain"
]


@pytest.mark.parametrize(("kind", "name", "steps"), SAVED)
def test_a_limit_in_an_epoch_saves_where_it_is(
    tmp_path: Path, kind: str, name: str, steps: int, clock: SimpleNamespace
) -> None:
    options = {"ckpt_interval_steps": steps}
    whole = run(kind, tmp_path / "whole", options=options)
    callbacks, arguments = limit(name, 5, clock)
    first = run(kind, tmp_path / "cut", *callbacks, options=options, **arguments)
    assert batches(first) == [1, 2, 3, 4, 5]
    # The stage ends, and a validation follows.
    assert stages(first) == stages(whole)[:4]
    assert first.scheduler.last_epoch == 1
    second = run(kind, tmp_path / "cut", options=options)
    assert batches(second) == batches(whole)[5:]
    assert stages(second) == stages(whole)
    assert second.scheduler.last_epoch == 3
    assert_same(whole, second)


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_that_is_raised_again_and_again(tmp_path: Path, kind: str) -> None:
    whole = run(kind, tmp_path / "whole")
    seen = []
    for steps in (5, 7, 12, 15, 24, 30, 36):
        resumed = run(kind, tmp_path / "cut", max_steps=steps)
        assert resumed.optimizer_step == steps
        seen += batches(resumed)
    assert seen == batches(whole)
    assert resumed.scheduler.last_epoch == 3
    assert_same(whole, resumed)


@pytest.mark.filterwarnings(r"ignore:.*fit\(ckpt_path=None\)` was called without a model")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_a_limit_saves_where_a_checkpoint_callback_has_a_path(tmp_path: Path) -> None:
    """ModelCheckpoint converts its ``dirpath`` to a string; other callbacks do not."""
    brain, callback = brain_of("none", tmp_path), OnExceptionCheckpoint(tmp_path)
    trainer = trainer_with(callback, enable_checkpointing=True, max_epochs=-1, max_steps=5)
    trainer.fit(to_lightning(brain), DataLoader(Noise(), 4), loader())
    assert brain.optimizer_step == 5
    assert (tmp_path / "last-within-epoch.ckpt").is_file()


@pytest.mark.parametrize("stop", [7, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_in_an_accumulation_window(tmp_path: Path, kind: str, stop: int) -> None:
    options = {"grad_accumulation_factor": 4}
    whole = run(kind, tmp_path / "whole", options=options)
    first = run(kind, tmp_path / "cut", Stops(stop), options=options)
    assert first.optimizer_step == stop // 4
    assert_same(whole, run(kind, tmp_path / "cut", options=options))


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_at_the_end_of_an_epoch(
    tmp_path: Path, kind: str, name: str, clock: SimpleNamespace
) -> None:
    whole = run(kind, tmp_path / "whole")
    callbacks, arguments = limit(name, BATCHES, clock)
    first = run(kind, tmp_path / "cut", *callbacks, **arguments)
    assert stages(first) == stages(whole)[:4]
    second = run(kind, tmp_path / "cut")
    assert stages(second) == stages(whole)[4:]
    assert second.scheduler.last_epoch == 3
    assert_same(whole, second)


# ------------------------------------------------------------------- max_time over starts


@pytest.mark.parametrize("kind", ["ours", "speechbrain"])
def test_max_time_is_of_each_start_from_directories(
    tmp_path: Path, kind: str, clock: SimpleNamespace
) -> None:
    whole = run(kind, tmp_path / "whole")
    counts = []
    for _ in range(4):
        resumed = run(kind, tmp_path / "cut", Ticks(clock), max_time={"seconds": 10})
        counts.append(len(batches(resumed)))
        clock.now += 1000
    assert counts == [10, 10, 10, 6]
    assert_same(whole, resumed)


def test_max_time_counts_on_from_a_file(tmp_path: Path, clock: SimpleNamespace) -> None:
    first = run("files", tmp_path, Ticks(clock), max_time={"seconds": 10})
    assert len(batches(first)) == 10
    clock.now += 1000
    second = run("files", tmp_path, Ticks(clock), max_time={"seconds": 16})
    assert len(batches(second)) == 6


def test_a_timer_of_the_users_counts_on_from_a_file(
    tmp_path: Path, clock: SimpleNamespace
) -> None:
    first, second = Timer({"seconds": 10}), Timer({"seconds": 100})
    run("files", tmp_path, Ticks(clock), first)
    run("files", tmp_path, Ticks(clock), second)
    assert first.time_elapsed() == 10
    assert second.time_elapsed() == 3 * BATCHES
