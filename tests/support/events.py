"""A trace of what a run does, which can interrupt the run at any of its events."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback


class Cut(RuntimeError):  # noqa: N818  no error of anybody's
    """What ends a run that is interrupted."""


class Event(NamedTuple):
    """Something that happened.

    Attributes:
        name: What, with the stage where there are several.
        place: The epoch, the Brain's step and its updates, and what tells apart events of
            one step. No two events of a run have the same name and place.
        told: Numbers that were handed over, which must be the same in a resumed run.
    """

    name: str
    place: tuple[Any, ...]
    told: tuple[Any, ...] = ()

    @property
    def key(self) -> tuple[str, tuple[Any, ...]]:
        return self.name, self.place

    def __str__(self) -> str:
        epoch, step, updates, which = self.place
        which = "" if which is None else f", {which}"
        return f"{self.name} (epoch {epoch}, step {step}, {updates} updates{which})"


class Events:
    """The events of one run.

    An event is around what happens: a run that is to be interrupted by an error ends before
    it, and one that is to be saved is saved, and ends, after it.

    Args:
        cut_at: The key of the event at which to interrupt the run.
        save: Saves; None interrupts by an error.

    Attributes:
        heard: So far.
        was_cut: Whether the run was interrupted.
        brain: The Brain that runs.
    """

    def __init__(
        self, cut_at: tuple[Any, ...] | None = None, save: Callable[[], None] | None = None
    ) -> None:
        self.heard: list[Event] = []
        self.cut_at = cut_at
        self.save = save
        self.saver: Callable[..., None] | None = None
        self.was_cut = False
        self.brain: Any = None

    @contextmanager
    def __call__(
        self, name: str, which: Any = None, told: tuple[Any, ...] = ()
    ) -> Iterator[None]:
        brain = self.brain
        place = (brain.counter.current, brain.step, brain.optimizer_step, which)
        event = Event(name, place, told)
        self.heard.append(event)
        here = event.key == self.cut_at and not self.was_cut
        if here and self.save is None:
            self._cut()
        yield
        if here and self.save is not None:
            # Before: what saves may have hooks too.
            self.was_cut = True
            self.save()
            self._cut()

    def now(self, name: str, which: Any = None, told: tuple[Any, ...] = ()) -> None:
        """An event with nothing in it."""
        with self(name, which, told):
            pass

    def _cut(self) -> None:
        self.was_cut = True
        raise Cut


# ------------------------------------------------------------------------ optimizers


class SteppedAdam(torch.optim.Adam):
    """Tells when it steps."""

    def __init__(self, parameters: Any, lr: float, events: Events, label: str) -> None:
        self.events, self.label = events, label
        super().__init__(parameters, lr)

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.events.now("step", self.label)
        super().step()
        self.events.now("stepped", self.label)
        return loss


# ------------------------------------------------------------------------- a callback

STEP_HOOKS = (
    "on_before_backward", "on_after_backward", "on_before_zero_grad",
    "on_before_optimizer_step",
)  # fmt: skip
BATCH_HOOKS = (
    "on_train_batch_start", "on_train_batch_end", "on_validation_batch_start",
    "on_validation_batch_end",
)  # fmt: skip
EPOCH_HOOKS = (
    "on_train_epoch_start", "on_validation_start", "on_validation_epoch_end",
    "on_validation_end", "on_train_epoch_end",
)  # fmt: skip
HOOKS = {
    "all": STEP_HOOKS + BATCH_HOOKS + EPOCH_HOOKS,
    "batches": BATCH_HOOKS + EPOCH_HOOKS,
    "none": (),
}


class Listener(Callback):
    """Tells what a callback of the user's hears.

    Attributes:
        trainer: The Trainer of the run.
    """

    trainer: Any = None
    heard = 0

    def __init__(self, events: Events) -> None:
        self.events = events

    def state_dict(self) -> dict[str, Any]:
        """It keeps a state, and so is told what it has missed."""
        return {"heard": self.heard}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.heard = state["heard"]

    def tell(self, *told: Any) -> None:
        """Its trainer.save_checkpoint may be called in an event."""
        self.save_checkpoint = self.trainer.save_checkpoint
        self.events.now(*told)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.trainer = trainer


def listener(events: Events, listens: str) -> Listener:
    """A callback that has these hooks, and no others: Lightning asks which it has."""
    hooks = {name: _hook(name) for name in HOOKS[listens]}
    return type("Listener", (Listener,), hooks)(events)  # type: ignore[no-any-return]


def _hook(name: str) -> Callable[..., None]:
    parameters = list(inspect.signature(getattr(Callback, name)).parameters)

    def hook(self: Listener, trainer: Any, pl_module: Any, *args: Any) -> None:
        handed = dict(zip(parameters[3:], args, strict=False))
        which = getattr(handed.get("optimizer"), "label", None)
        index = (handed["batch_idx"],) if "batch_idx" in handed else ()
        told = (trainer.current_epoch, trainer.global_step, *index)
        self.tell(f"callback.{name}", which, told)

    return hook
