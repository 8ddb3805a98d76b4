"""Two sides to run the same scenario on, and the record that each leaves behind."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import speechbrain
import torch
from speechbrain.utils.epoch_loop import EpochCounter as SpeechBrainEpochCounter
from speechbrain.utils.epoch_loop import (
    EpochCounterWithStopper as SpeechBrainEpochCounterWithStopper,
)
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

import brain_lightning
from brain_lightning.cli.verify_recorder import HOOKS
from brain_lightning.protocol import TrainerDefaults, parameters_of
from tests.support.environment import seed_everything
from tests.support.sharded import wholes


@dataclass(frozen=True)
class Side:
    """One implementation of Brain."""

    name: str
    Brain: Any
    Stage: Any
    EpochCounter: Any
    EpochCounterWithStopper: Any


SPEECHBRAIN = Side(
    "speechbrain",
    speechbrain.Brain,
    speechbrain.Stage,
    SpeechBrainEpochCounter,
    SpeechBrainEpochCounterWithStopper,
)
# SpeechBrain's own Brain, with its fit and evaluate on a Trainer.
PATCHED = dataclasses.replace(SPEECHBRAIN, name="patched")
OURS = Side(
    "brain_lightning",
    brain_lightning.Brain,
    brain_lightning.Stage,
    brain_lightning.EpochCounter,
    brain_lightning.EpochCounterWithStopper,
)


@dataclass
class Record:
    """Every event in order, and all tensors at first and at each stage's end."""

    events: list[tuple[Any, ...]] = field(default_factory=list)
    stage_losses: list[tuple[str, Any, float]] = field(default_factory=list)
    tensors: list[dict[str, Tensor]] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)

    def event(self, brain: Any, name: str, *details: Any) -> None:
        # A wrapper says no more than what it wraps.
        parts = (m for m in brain.modules.modules() if type(m) is not DistributedDataParallel)
        training = tuple(m.training for m in parts)
        self.events.append(
            (name, *details, torch.is_grad_enabled(), training, brain.step, rng_digest())
        )

    def without_random_state(self) -> Record:
        return replace(self, events=[event[:-1] for event in self.events])


def rng_digest() -> str:
    # The repr of numpy's own array would take most of the time of a scenario.
    kind, words, *rest = np.random.get_state()
    state = torch.get_rng_state().numpy().tobytes() + np.asarray(words).tobytes()
    state += repr((random.getstate(), kind, rest)).encode()
    return hashlib.sha256(state).hexdigest()[:12]


def attach(record: Record, brain: Any) -> None:
    """Records the hooks of one instance; its class, and what that overrides, stay."""
    record.tensors.append(tensors_of(brain))
    for name in HOOKS:
        setattr(brain, name, _recorded(record, brain, name, getattr(brain, name)))


def _recorded(record: Record, brain: Any, name: str, hook: Callable[..., Any]) -> Any:
    @functools.wraps(hook)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        stage = [a.name for a in (*args, *kwargs.values()) if hasattr(a, "name")]
        plain = [
            a for a in (*args, *kwargs.values()) if isinstance(a, (bool, int, float, str))
        ]
        record.event(brain, name, *stage, *plain)
        if name == "on_stage_end":
            record.stage_losses.append((args[0].name, *args[2:], args[1]))
            record.tensors.append(tensors_of(brain))
        return hook(*args, **kwargs)

    return wrapper


def tensors_of(brain: Any) -> dict[str, Tensor]:
    """Copies of every weight, buffer, gradient and optimizer tensor; of shards the whole."""
    found = dict(brain.modules.state_dict(keep_vars=True))
    found |= {
        f"grad.{n}": p.grad for n, p in brain.modules.named_parameters() if p.grad is not None
    }
    for name, optimizer in vars(brain).items():
        if isinstance(optimizer, Optimizer):
            for index, parameter in enumerate(parameters_of(optimizer)):
                state = optimizer.state.get(parameter, {})
                found |= {f"{name}.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
    return wholes(found)


class TracedLoader(DataLoader):
    """A DataLoader that tells when it is iterated and when a batch is fetched."""

    record: Record
    brain: Any

    def traced(self, record: Record, brain: Any) -> TracedLoader:
        self.record, self.brain = record, brain
        return self

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.record.event(self.brain, "iter")
        iterator = super().__iter__()
        while True:
            self.record.event(self.brain, "fetch")
            try:
                batch = next(iterator)
            except StopIteration:
                return
            yield batch


Scenario = Callable[[Side, Record], Any]


def run(side: Side, scenario: Scenario, **trainer: Any) -> tuple[Record, Any]:
    """Runs a scenario on one side, from the same seed; and with arguments for its Trainer."""
    seed_everything(42)
    record = Record()
    with contextlib.ExitStack() as stack:
        if side is not OURS:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        if side is PATCHED:
            stack.enter_context(brain_lightning.patch_speechbrain(trainer))
        elif trainer:
            defaults = TrainerDefaults(trainer)
            stack.enter_context(mock.patch.object(side.Brain, "_lightning_defaults", defaults))
        brain = scenario(side, record)
    record.tensors.append(tensors_of(brain))
    record.event(brain, "end")
    return record, brain


def assert_equal(ours: Record, theirs: Record, random: bool = True) -> None:
    """Bit for bit: events, losses, weights, gradients and optimizer states.

    SpeechBrain does not save the random state: where runs are resumed it is left out.
    """
    if not random:
        ours, theirs = ours.without_random_state(), theirs.without_random_state()
    for index, (mine, other) in enumerate(zip(ours.events, theirs.events, strict=False)):
        before = "\n".join(map(str, ours.events[max(0, index - 3) : index]))
        assert mine == other, f"event {index} differs, after\n{before}"
    assert len(ours.events) == len(theirs.events)
    assert ours.stage_losses == theirs.stage_losses
    assert ours.results == theirs.results
    assert len(ours.tensors) == len(theirs.tensors)
    for stage, (mine, other) in enumerate(zip(ours.tensors, theirs.tensors, strict=True)):
        assert mine.keys() == other.keys(), f"at stage end {stage}"
        for name in mine:
            assert torch.equal(mine[name], other[name]), f"{name} differs at stage end {stage}"


def assert_same_run(scenario: Scenario, side: Side, theirs: tuple[Record, Any]) -> None:
    """A side runs a scenario as SpeechBrain did: bits, order, and what the Brain counts."""
    expected, their_brain = theirs
    ours, our_brain = run(side, scenario)
    assert_equal(ours, expected)
    for counter in ("step", "optimizer_step", "avg_train_loss"):
        assert getattr(our_brain, counter) == getattr(their_brain, counter)
    assert_moved(ours)


def assert_moved(record: Record) -> None:
    """Some weight is not what it was when the Brain was made."""
    first = record.tensors[0]
    # The names change where a module is wrapped for several processes, or compiled.
    last = {
        name.replace(".module.", ".").replace("._orig_mod.", "."): tensor
        for name, tensor in record.tensors[-1].items()
    }
    moved = [name for name, weight in first.items() if not torch.equal(weight, last[name])]
    assert moved, "no weight moved"
