"""What the hooks of a recipe have gathered in an epoch that is not over."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from .protocol import BrainProtocol

State = dict[str, Any]

PLAIN = (type(None), bool, int, float, str, bytes)
# What the run itself keeps, and saves elsewhere.
OWN = frozenset(BrainProtocol.__annotations__)


class NotPlainError(TypeError):
    """A value cannot be saved without code to load it."""


def plain(value: Any) -> Any:
    """A copy of a value that consists of tensors, numbers, texts, lists and dicts.

    Args:
        value: The value.

    Returns:
        The copy, with numbers of numpy as python's.

    Raises:
        NotPlainError: There is something else in it.
    """
    if type(value) in PLAIN:
        return value
    if isinstance(value, np.generic):
        return plain(value.item())
    if type(value) is Tensor:
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(plain(each) for each in value)
    if type(value) is dict:
        return {plain(key): plain(each) for key, each in value.items()}
    raise NotPlainError(type(value).__name__)


def plain_values(values: Mapping[str, Any]) -> State:
    """Those of several values that are plain.

    Args:
        values: By name.
    """
    found = {}
    for name, value in values.items():
        with contextlib.suppress(NotPlainError):
            found[name] = plain(value)
    return found


class Gathered:
    """The attributes in which a Brain gathers statistics while it trains one epoch.

    These are what ``on_stage_start(TRAIN)`` has assigned, numbers that have changed
    since, and objects with SpeechBrain's or torchmetrics' interface for statistics.

    Args:
        brain: The Brain, before ``on_stage_start``.
    """

    def __init__(self, brain: BrainProtocol) -> None:
        self._brain = brain
        self._before = {name: id(value) for name, value in vars(brain).items()}
        self._assigned: frozenset[str] = frozenset()
        self._numbers: State = {}

    def begin(self) -> None:
        """Takes note of what ``on_stage_start`` has assigned."""
        own = vars(self._brain)
        changed = {name for name in own if self._before.get(name) != id(own[name])}
        self._assigned = frozenset(changed - OWN)
        self._numbers = {name: own[name] for name in own.keys() - OWN if _is_number(own[name])}

    def state(self) -> State:
        """What there is so far, where it can be saved."""
        own = vars(self._brain)
        values = {
            name: value
            for name, value in own.items()
            if name in self._assigned
            or (name in self._numbers and _is_number(value) and value != self._numbers[name])
        }
        return {
            "values": plain_values(values),
            "brain": _statistics(own),
            "hparams": _statistics(_hparams(self._brain)),
        }

    def restore(self, state: State) -> None:
        """Gives the Brain what it had gathered.

        Args:
            state: What ``state`` returned.
        """
        vars(self._brain).update(state["values"])
        for owner, saved in [
            (vars(self._brain), state["brain"]),
            (_hparams(self._brain), state["hparams"]),
        ]:
            for name, values in saved.items():
                if _is_statistics(owner.get(name)):
                    vars(owner[name]).update(values)


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _hparams(brain: BrainProtocol) -> Mapping[str, Any]:
    return getattr(getattr(brain, "hparams", None), "__dict__", {})


def _statistics(owner: Mapping[str, Any]) -> State:
    found = {name: value for name, value in owner.items() if _is_statistics(value)}
    return {name: plain_values(vars(value)) for name, value in found.items()}


def _is_statistics(value: object) -> bool:
    of_speechbrain = is_statistics(value, "append", "summarize")
    return of_speechbrain or is_statistics(value, "update", "compute")


def is_statistics(value: object, *methods: str) -> bool:
    """Whether an object gathers statistics.

    Args:
        value: Anything.
        *methods: Of the interface: SpeechBrain's ``append`` and ``summarize``, or
            torchmetrics' ``update`` and ``compute``.
    """
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return False
    return all(callable(getattr(value, method, None)) for method in methods)
