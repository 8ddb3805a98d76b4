"""Statistics that the hooks of a recipe accumulate on the Brain in the current epoch."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch

from brain_lightning.protocol import BrainProtocol, OptionValues, hparams_of, is_statistics

from .plain_values import State, plain_values, restore_attributes

logger = logging.getLogger(__name__)

# Objects whose statistics objects are saved.
OWNERS = ("brain", "hparams")

# Attributes that the run saves elsewhere. The two exceptions may be changed by the recipe: a
# hook may raise nonfinite_patience, and a fit_batch of SpeechBrain 0.5 counts valid_step.
OWN = {*BrainProtocol.__annotations__, *OptionValues.__annotations__} - {
    "nonfinite_patience",
    "valid_step",
}


class EpochStatistics:
    """The attributes in which a Brain accumulates statistics while it trains one epoch.

    These are the attributes that ``on_stage_start(TRAIN)`` and ``on_stage_end(TRAIN)`` have
    assigned, numbers that have changed since then, and objects with SpeechBrain's or
    torchmetrics' interface for statistics.

    Args:
        brain: The Brain, before ``on_stage_start``.
    """

    def __init__(self, brain: BrainProtocol) -> None:
        self._brain = brain
        self._before = self._identities()
        self._before_end: dict[str, int] | None = None
        self._assigned: set[str] = set()
        self._numbers: State = {}
        self._reported: set[str] = set()

    def begin(self) -> None:
        """Records the attributes that ``on_stage_start`` has assigned."""
        now = self._identities()
        self._assigned = {name for name in now if self._before.get(name) != now[name]}
        own = vars(self._brain)
        self._numbers = {name: own[name] for name in now if _is_number(own[name])}

    def end(self) -> None:
        """Records the attributes before ``on_stage_end`` is called."""
        self._before_end = self._identities()

    def has_unsaved_after_end(self) -> bool:
        """Whether ``on_stage_end`` has assigned something that cannot be saved."""
        own, now, before = vars(self._brain), self._identities(), self._before_end
        if before is None:
            # The epoch was resumed after on_stage_end, and its attributes were restored.
            return False
        assigned = {name: own[name] for name in now if before.get(name) != now[name]}
        unsaved = assigned.keys() - plain_values(assigned).keys()
        return not all(_accumulates(own[name]) for name in unsaved)

    def copy(self) -> State:
        """Copies the statistics. Containers are copied one level deep."""
        return _apply_to_each(_copies, self._now())

    def state(self, copied: State | None = None) -> State:
        """Returns the statistics that can be saved.

        Args:
            copied: Result of ``copy``, to save the statistics at that time; None to save the
                current statistics.
        """
        found = self._now() if copied is None else copied
        saved = _apply_to_each(plain_values, found)
        self._report(found["values"].keys() - saved["values"].keys())
        return saved

    def restore(self, state: State) -> None:
        """Restores saved statistics.

        Args:
            state: Result of ``state``.
        """
        restore_attributes(self._brain, state["values"])
        self._assigned |= state["values"].keys()
        for key, owner in self._owners().items():
            for name, values in state[key].items():
                if _accumulates(owner.get(name)):
                    for part, attributes in zip(_parts(owner[name]), values, strict=False):
                        restore_attributes(part, attributes)

    def undo(self, copied: State) -> None:
        """Restores statistics that were copied in this process.

        Args:
            copied: Result of ``copy``.
        """
        own, values = vars(self._brain), copied["values"]
        # ``copied`` has only the numbers that had changed. Reset the others.
        own.update({n: v for n, v in self._numbers.items() if n in own and n not in values})
        self.restore(self.state(copied))

    def _owners(self) -> dict[str, dict[str, Any]]:
        return {"brain": vars(self._brain), "hparams": hparams_of(self._brain)}

    def _now(self) -> State:
        found = {owner: _statistics(values) for owner, values in self._owners().items()}
        return {"values": self._values(), **found}

    def _values(self) -> State:
        own, now, before = vars(self._brain), self._identities(), self._before_end
        names = self._assigned & own.keys()
        names |= {n for n in now if _is_number(own[n]) and own[n] != self._numbers.get(n)}
        if before is not None:
            names |= {n for n in now if before.get(n) != now[n]}
        return {name: own[name] for name in own if name in names}

    def _identities(self) -> dict[str, int]:
        return {name: id(v) for name, v in vars(self._brain).items() if name not in OWN}

    def _report(self, left_out: Collection[str]) -> None:
        """Logs once the attributes that are neither plain values nor statistics."""
        own = vars(self._brain)
        unknown = {n for n in left_out if not _accumulates(own[n]) and not callable(own[n])}
        new = unknown - self._reported
        if new:
            logger.info(
                "self.%s, which on_stage_start has assigned, is not saved within an epoch: it "
                "contains more than numbers, strings and tensors.",
                ", self.".join(sorted(new)),
            )
        self._reported |= new


# Types of containers in which statistics are collected.
CONTAINERS = (list, dict, set, deque, np.ndarray)


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _apply_to_each(change: Callable[[Mapping[str, Any]], State], found: State) -> State:
    """Applies a function to the attributes of the Brain and of each statistics object."""
    statistics = {
        owner: {name: [*map(change, parts)] for name, parts in found[owner].items()}
        for owner in OWNERS
    }
    return {"values": change(found["values"]), **statistics}


def _copies(values: Mapping[str, Any]) -> State:
    return {name: _copy(value) for name, value in values.items()}


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return value.copy() if isinstance(value, CONTAINERS) else value


def _statistics(owner: Mapping[str, Any]) -> State:
    return {
        name: [vars(part) for part in _parts(value)]
        for name, value in owner.items()
        if _accumulates(value)
    }


def _parts(statistics: Any) -> list[Any]:
    """Returns the objects with the values: a torchmetrics metric may contain other metrics."""
    if isinstance(statistics, torch.nn.Module):
        return list(statistics.modules())
    return [statistics]


def _accumulates(value: object) -> bool:
    speechbrains = is_statistics(value, "append", "summarize")
    return speechbrains or is_statistics(value, "update", "compute")
