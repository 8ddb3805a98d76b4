"""What the hooks of a recipe accumulate on their Brain in an epoch that is not over."""

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

# Whose objects of statistics are saved.
OWNERS = ("brain", "hparams")

# What the run itself keeps, and saves elsewhere; a hook may raise the patience, and a
# fit_batch of SpeechBrain 0.5 counts valid_step.
OWN = {*BrainProtocol.__annotations__, *OptionValues.__annotations__} - {
    "nonfinite_patience",
    "valid_step",
}


class EpochStatistics:
    """The attributes in which a Brain accumulates statistics while it trains one epoch.

    These are what ``on_stage_start(TRAIN)`` and ``on_stage_end(TRAIN)`` have assigned,
    numbers that have changed since, and objects with SpeechBrain's or torchmetrics'
    interface for statistics.

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
        """Records what ``on_stage_start`` has assigned."""
        now = self._identities()
        self._assigned = {name for name in now if self._before.get(name) != now[name]}
        own = vars(self._brain)
        self._numbers = {name: own[name] for name in now if _is_number(own[name])}

    def end(self) -> None:
        """Records what there is before ``on_stage_end``."""
        self._before_end = self._identities()

    def lacks_what_end_assigned(self) -> bool:
        """Whether ``on_stage_end`` has assigned something that cannot be saved."""
        own, now, before = vars(self._brain), self._identities(), self._before_end
        if before is None:
            # What was restored could be saved.
            return False
        assigned = {name: own[name] for name in now if before.get(name) != now[name]}
        unsaved = assigned.keys() - plain_values(assigned).keys()
        return not all(_accumulates(own[name]) for name in unsaved)

    def copy(self) -> State:
        """What there is so far, unchanged by what comes; containers are copied one deep."""
        return _of_each(_copies, self._now())

    def state(self, copied: State | None = None) -> State:
        """What there is so far, where it can be saved.

        Args:
            copied: From ``copy``, to save what there was then.
        """
        found = self._now() if copied is None else copied
        saved = _of_each(plain_values, found)
        self._report(found["values"].keys() - saved["values"].keys())
        return saved

    def restore(self, state: State) -> None:
        """Restores what the Brain had accumulated.

        Args:
            state: What ``state`` returned.
        """
        restore_attributes(self._brain, state["values"])
        self._assigned |= state["values"].keys()
        for key, owner in self._owners().items():
            for name, values in state[key].items():
                if _accumulates(owner.get(name)):
                    for part, attributes in zip(_parts(owner[name]), values, strict=False):
                        restore_attributes(part, attributes)

    def undo(self, copied: State) -> None:
        """Restores what the Brain had accumulated in this process.

        Args:
            copied: From ``copy``.
        """
        own, values = vars(self._brain), copied["values"]
        # Of the numbers it has what had changed by then.
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
        """Logs, once, what ``on_stage_start`` made and is neither plain nor statistics."""
        own = vars(self._brain)
        unknown = {n for n in left_out if not _accumulates(own[n]) and not callable(own[n])}
        new = unknown - self._reported
        if new:
            logger.info(
                "self.%s, which on_stage_start has made, is not saved within an epoch: it is "
                "made of more than numbers, texts and tensors.",
                ", self.".join(sorted(new)),
            )
        self._reported |= new


# What statistics are gathered in.
CONTAINERS = (list, dict, set, deque, np.ndarray)


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _of_each(change: Callable[[Mapping[str, Any]], State], found: State) -> State:
    """Changes the attributes of the Brain, and those of each part of its statistics."""
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
    """A metric of torchmetrics may have others in it."""
    if isinstance(statistics, torch.nn.Module):
        return list(statistics.modules())
    return [statistics]


def _accumulates(value: object) -> bool:
    speechbrains = is_statistics(value, "append", "summarize")
    return speechbrains or is_statistics(value, "update", "compute")
