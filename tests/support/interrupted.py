"""A training that can be interrupted anywhere and resumed, in many settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch import callbacks as lightnings
from torch import Tensor, nn
from torch.utils.data import DataLoader

from brain_lightning import Brain, Checkpointer, EpochCounter, to_lightning

from .events import Cut, Event, Events, SteppedAdam, listener
from .interrupted_data import Examples, Items, StatefulLoader
from .resuming import seed
from .upstream import weights_only

# How a run is interrupted, and what resumes it.
WAYS = (
    "error", "error-last", "trainer", "ours", "ours-within", "speechbrain",
    "speechbrain-within",
)  # fmt: skip
VALID_BATCHES = 2
HERE = "<folder>"


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
        name: Of the setting.
        accumulation: Batches for one update, by the run option.
        optimizers: One, or two that step together.
        norm: Whether the model has buffers that every forward pass changes.
        data: ``map``; ``items`` of a stream, or a ``loader`` of a class of its own, which
            have no length but a position.
        workers: Whether the loader has two.
        loop: ``around`` SpeechBrain's parts of fit, or ``own``: a fit that calls each twice.
        own_fit_batch: Two optimizers that step one after the other, in a ``fit_batch``.
        listens: What the callback that makes events hears.
        callbacks: Names of those of Lightning.
        batches: Of a training epoch.
        epochs: How many.
        arguments: Of the Trainer.
        processes: How many; where there are several, each does all that the others do.
        every: How many events there are to a point.
        ways: The ways of interruption that are possible.
    """

    name: str
    accumulation: int = 1
    optimizers: int = 1
    norm: bool = True
    data: str = "map"
    workers: bool = False
    loop: str = ""
    own_fit_batch: bool = False
    listens: str = "all"
    callbacks: tuple[str, ...] = ()
    batches: int = 5
    epochs: int = 3
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)
    processes: int = 1
    every: int = 1
    ways: tuple[str, ...] = WAYS


@dataclass
class Outcome:
    """What a run has left.

    Attributes:
        heard: Its events.
        was_cut: Whether it was interrupted where it was to be.
        state: What it has learned and counted, by name; of a run that came to its end.
    """

    heard: list[Event]
    was_cut: bool
    state: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------- data


def loaders(setting: Setting, events: Events) -> tuple[Any, Any]:
    """For training and for validation."""
    valid = Examples(2 * VALID_BATCHES, events, "VALID")
    valid_loader = DataLoader(valid, 2, collate_fn=valid.collate)
    if setting.data == "loader":
        return StatefulLoader(setting.batches, events), valid_loader
    items, workers = 2 * setting.batches * setting.processes, 2 * setting.workers
    if setting.data == "items":
        stream = Items(items, events)
        collate = stream.examples.collate
        return DataLoader(stream, 2, num_workers=workers, collate_fn=collate), valid_loader
    train = Examples(items, events, "TRAIN")
    train_loader = DataLoader(
        train, 2, shuffle=True, num_workers=workers, collate_fn=train.collate
    )
    return train_loader, valid_loader


# ------------------------------------------------------------------------------ Brains


class Recipe(Brain):
    """A recipe as they are: a schedule, and numbers that it gathers over an epoch."""

    events: Events
    setting: Setting
    counter: EpochCounter
    losses: list[float]
    train_stats: dict[str, Any] | None = None

    def init_optimizers(self) -> None:
        parts = {"all": self.modules}
        if self.setting.optimizers == 2:
            parts = {"backbone": self.modules.backbone, "head": self.modules.head}
        if "BackboneFinetuning" in self.setting.callbacks:
            parts = {"head": self.modules.head}
        self.optimizers_dict = {
            name: SteppedAdam(part.parameters(), 0.02, self.events, name)
            for name, part in parts.items()
        }
        last = list(self.optimizers_dict.values())[-1]
        self.schedule = torch.optim.lr_scheduler.StepLR(last, 1, 0.7)
        if self.checkpointer is not None:
            for name, optimizer in self.optimizers_dict.items():
                self.checkpointer.add_recoverable(f"optimizer_{name}", optimizer)
            self.checkpointer.add_recoverable("schedule", self.schedule)

    def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
        with self.events(f"on_stage_start {stage.name}"):
            if stage.name == "TRAIN":
                self.losses = []
                self.largest = 0.0

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        # So that it is known that it may be called within a batch.
        self.events.saver = self.save
        self.events.now("on_fit_batch_start", told=(should_step,))

    def compute_forward(self, batch: Any, stage: Any) -> Any:
        with self.events(f"compute_forward {stage.name}", told=(number(batch[0]),)):
            x = batch[0]
            if stage.name == "TRAIN":
                x = nn.functional.dropout(x, 0.3)
            return self.modules.head(self.modules.backbone(x))

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        with self.events(f"compute_objectives {stage.name}", told=(number(predictions),)):
            loss = nn.functional.mse_loss(predictions, batch[1])
            if stage.name == "TRAIN":
                self.losses.append(float(loss.detach()))
                self.largest = max(self.largest, self.losses[-1])
            return loss

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        self.events.now("on_fit_batch_end", told=(number(loss), should_step))

    def save(self, way: str, folder: Path, trainer: Trainer) -> None:
        """Saves as the way says, in the middle of an event."""
        if way == "trainer":
            trainer.save_checkpoint(folder / "saved.ckpt")
        elif way.endswith("within"):
            self.checkpointer.save_checkpoint(end_of_epoch=False)
        else:
            self.checkpointer.save_checkpoint()

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        gathered = (*self.losses, self.largest)
        if stage.name == "TRAIN":
            with self.events("on_stage_end TRAIN", told=(stage_loss, *gathered)):
                self.train_stats = {"loss": stage_loss, "epoch": epoch}
            return
        # Within an epoch there are those of the last one, which nobody keeps.
        is_over = self.train_stats is not None and self.train_stats["epoch"] == epoch
        stats = tuple(self.train_stats.items()) if self.train_stats and is_over else ()
        with self.events("on_stage_end VALID", told=(stage_loss, stats, *gathered)):
            self.schedule.step()


class GanLike(Recipe):
    """Steps its optimizers one after the other."""

    def fit_batch(self, batch: Any) -> Any:
        self.on_fit_batch_start(batch, True)
        total = torch.zeros(())
        for name, optimizer in self.optimizers_dict.items():
            predictions = self._forward(batch, name)
            loss = self.compute_objectives_of(name, predictions, batch)
            loss.backward()
            optimizer.step()
            self.events.now("between parts", name)
            optimizer.zero_grad()
            total += loss.detach()
        self.optimizer_step += 1
        self.on_fit_batch_end(batch, predictions, total, True)
        return total

    def _forward(self, batch: Any, name: str) -> Any:
        with self.events("forward", name, (number(batch[0]),)):
            x = nn.functional.dropout(batch[0], 0.3)
            return self.modules.head(self.modules.backbone(x))

    def compute_objectives_of(self, name: str, predictions: Any, batch: Any) -> Any:
        with self.events("objectives", name, (number(predictions),)):
            loss = nn.functional.mse_loss(predictions, batch[1])
            self.losses.append(float(loss.detach()))
            self.largest = max(self.largest, self.losses[-1])
            return loss


class Around(Recipe):
    """Overrides the parts of fit."""

    def _fit_train(self, train_set: Any, epoch: Any, enable: bool) -> None:
        super()._fit_train(train_set, epoch, enable)

    def _fit_valid(self, valid_set: Any, epoch: Any, enable: bool) -> None:
        super()._fit_valid(valid_set, epoch, enable)


class OwnFit(Recipe):
    """Trains twice an epoch, and validates before, between and after."""

    def fit(self, epoch_counter: Any, train_set: Any, valid_set: Any) -> None:
        self.on_fit_start()
        for epoch in epoch_counter:
            for _ in range(2):
                self._fit_train(train_set, epoch, False)
                self._fit_valid(valid_set, epoch, False)


def number(tensor: Tensor) -> float:
    """One that differs where any does."""
    return float(
        (tensor.detach().double() * torch.arange(1, 1 + tensor.numel()).view_as(tensor)).sum()
    )


def modules(setting: Setting) -> dict[str, nn.Module]:
    norm = [nn.BatchNorm1d(6)] if setting.norm else []
    backbone = nn.Sequential(nn.Linear(4, 6), *norm, nn.Dropout(0.3), nn.ReLU())
    return {"backbone": backbone, "head": nn.Linear(6, 1)}


# -------------------------------------------------------------------------------- runs


def lightning_callbacks(setting: Setting, folder: Path) -> list[Callback]:
    """Those that the setting names."""
    made = {
        "EarlyStopping": lambda: lightnings.EarlyStopping("valid_loss", patience=5),
        "stops": lambda: lightnings.EarlyStopping("valid_loss", min_delta=100.0, patience=1),
        "ModelCheckpoint": lambda: lightnings.ModelCheckpoint(
            folder / "best", monitor="valid_loss", save_top_k=2
        ),
        "GradientAccumulationScheduler": lambda: lightnings.GradientAccumulationScheduler(
            {0: 1, 1: 2}
        ),
        "EMAWeightAveraging": lambda: lightnings.EMAWeightAveraging(decay=0.9),
        "BackboneFinetuning": lambda: lightnings.BackboneFinetuning(1),
    }
    return [made[name]() for name in setting.callbacks]


def saving_callbacks(way: str, folder: Path) -> list[Callback]:
    """Those that save where there is an error."""
    if way == "error":
        return [lightnings.OnExceptionCheckpoint(folder / "error")]
    if way == "error-last":
        last = folder / "error"
        return [lightnings.ModelCheckpoint(last, save_last=True, save_on_exception=True)]
    return []


def run(
    setting: Setting, way: str, folder: Path, cut_at: tuple[Any, ...] | None = None
) -> Outcome:
    """Trains, from what there is in the folder, with all objects new as in a new process.

    Args:
        setting: How to train.
        way: How to interrupt it, and what to resume from.
        folder: For all that is saved.
        cut_at: The key of the event at which to interrupt it.
    """
    # Without a file that it could resume from it is seeded as the first.
    rank = int(os.environ.get("RANK", 0))
    seed(100 + len(list(folder.rglob("*.ckpt"))) + 1000 * rank)
    events = Events(cut_at)
    brain = make_brain(setting, way, folder, events)
    heard_by = listener(events, setting.listens)
    own = [heard_by, *lightning_callbacks(setting, folder)]
    if not way.startswith("error"):
        events.save = lambda: brain.save(way, folder, heard_by.trainer)
    with suppress(Cut):
        fit(setting, way, folder, brain, [*own, *saving_callbacks(way, folder)])
    was_cut = events.was_cut
    state = {} if was_cut else state_of(brain, heard_by.trainer, own, folder)
    return Outcome(events.heard, was_cut, state)


def make_brain(setting: Setting, way: str, folder: Path, events: Events) -> Recipe:
    """A new one, with a Checkpointer where the way has one."""
    counter, entries = EpochCounter(setting.epochs), modules(setting)
    checkpointer: Any = None
    if way.startswith("ours"):
        checkpointer = Checkpointer(folder / "save", {**entries, "counter": counter})
    elif way.startswith("speechbrain"):
        from speechbrain.utils.checkpoints import Checkpointer as SpeechBrains

        checkpointer = SpeechBrains(folder / "save", {**entries, "counter": counter})
    options = {
        "device": "cpu", "noprogressbar": True, "ckpt_interval_minutes": 0,
        "ckpt_interval_steps": 0, "grad_accumulation_factor": setting.accumulation,
    }  # fmt: skip
    if setting.processes > 1:
        options["distributed_backend"] = "gloo"
    if setting.accumulation == 1:
        # Not explicit: GradientAccumulationScheduler may set its own.
        del options["grad_accumulation_factor"]
    kinds = {"": Recipe, "around": Around, "own": OwnFit}
    kind = GanLike if setting.own_fit_batch else kinds[setting.loop]
    brain = kind(entries, None, {"epoch_counter": counter}, options, checkpointer)
    brain.events, brain.setting, brain.counter = events, setting, counter
    events.brain = brain
    return brain


def fit(
    setting: Setting, way: str, folder: Path, brain: Recipe, callbacks: list[Callback]
) -> None:
    """With the Brain's own Trainer where it has a Checkpointer, otherwise a user's."""
    train, valid = loaders(setting, brain.events)
    saves = any(isinstance(c, lightnings.Checkpoint) for c in callbacks)
    arguments: dict[str, Any] = {"callbacks": callbacks, "enable_checkpointing": saves}
    arguments |= setting.arguments
    if brain.checkpointer is not None:
        brain.fit(brain.counter, train, valid, trainer=arguments)
        return
    if setting.processes > 1:
        arguments |= {"devices": setting.processes, "strategy": "ddp"}
    trainer = Trainer(
        accelerator="cpu", max_epochs=-1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, **arguments,
    )  # fmt: skip
    path = folder / "saved.ckpt"
    last = path if path.exists() else None
    module = to_lightning(brain, epoch_counter=brain.counter)
    ckpt_path: Any = "last" if way.startswith("error") else last
    trainer.fit(module, train, valid, ckpt_path=ckpt_path, **weights_only(None))


def state_of(
    brain: Recipe, trainer: Trainer, callbacks: list[Callback], folder: Path
) -> dict[str, Any]:
    """What a run has learned and counted, by name."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.total
    assert brain.optimizers_dict is not None
    everything: dict[str, Any] = {
        "modules": brain.modules.state_dict(),
        "optimizers": {n: o.state_dict() for n, o in brain.optimizers_dict.items()},
        "schedule": brain.schedule.state_dict(),
        "callbacks": {c.state_key.split("{")[0]: c.state_dict() for c in callbacks},
        "trainer": {
            "current_epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "total_batch_idx": trainer.fit_loop.epoch_loop.total_batch_idx,
            "batches": vars(batches),
        },
        "brain": {
            "epoch": brain.counter.current, "updates": brain.optimizer_step,
            "step": brain.step, "average": brain.avg_train_loss,
        },
    }  # fmt: skip
    for state in everything["callbacks"].values():
        # Of ModelCheckpoint, whose load_state_dict leaves it out.
        state.pop("current_score", None)
    return dict(flattened("", everything, str(folder)))


def flattened(name: str, value: Any, folder: str) -> Iterator[tuple[str, Any]]:
    """Each part by its name, the same in any folder."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from flattened(f"{name}.{key}".replace(folder, HERE), part, folder)
        yield f"{name} keys", sorted(str(key).replace(folder, HERE) for key in value)
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from flattened(f"{name}.{index}", part, folder)
        yield f"{name} length", len(value)
    elif isinstance(value, Tensor):
        yield name, value.detach().clone()
    else:
        yield name, value.replace(folder, HERE) if isinstance(value, str) else value
