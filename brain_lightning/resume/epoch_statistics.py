"""What the hooks of a recipe have gathered in an epoch that is not over."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brain_lightning.protocol import BrainProtocol, OptionValues, hparams_of, is_statistics

logger = logging.getLogger(__name__)

State = dict[str, Any]

PLAIN = (type(None), bool, int, float, str, bytes)
# What the run itself keeps, and saves elsewhere.
OWN = frozenset(BrainProtocol.__annotations__ | OptionValues.__annotations__)


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
    """Those of several values that are plain, or containers of plain values.

    Args:
        values: By name.
    """
    found = {}
    for name, value in values.items():
        with contextlib.suppress(NotPlainError):
            found[name] = plain(_opened(value))
    return found


def _opened(value: Any) -> Any:
    """What is in a container: its type is that of the one it is put back into."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, set, deque)):
        return list(value)
    return value


def restore_attributes(owner: Any, values: State) -> None:
    """Gives an object the values of attributes.

    Args:
        owner: The object; a container that it has is filled, a tensor replaced on its
            device.
        values: From ``plain_values``.
    """
    own = vars(owner)
    for name, value in values.items():
        current = own.get(name)
        if isinstance(current, np.ndarray):
            current[...] = value.numpy()
        elif isinstance(current, Tensor) and isinstance(value, Tensor):
            own[name] = value.to(current.device)
        elif isinstance(current, (dict, set)) and type(current) is not type(value):
            current.clear()
            current.update(value)
        elif isinstance(current, (list, deque)) and type(current) is not type(value):
            current.clear()
            current.extend(value)
        else:
            own[name] = value


class EpochStatistics:
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
        self._told: set[str] = set()

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
        saved = plain_values(values)
        self._tell(values.keys() - saved.keys())
        return {
            "values": saved,
            "brain": _statistics(own),
            "hparams": _statistics(hparams_of(self._brain)),
        }

    def restore(self, state: State) -> None:
        """Gives the Brain what it had gathered.

        Args:
            state: What ``state`` returned.
        """
        restore_attributes(self._brain, state["values"])
        for owner, saved in [
            (vars(self._brain), state["brain"]),
            (hparams_of(self._brain), state["hparams"]),
        ]:
            for name, values in saved.items():
                if _is_statistics(owner.get(name)):
                    for part, attributes in zip(_parts(owner[name]), values, strict=False):
                        restore_attributes(part, attributes)

    def _tell(self, left_out: Collection[str]) -> None:
        """Once, of what ``on_stage_start`` made, and is neither plain nor statistics."""
        own = vars(self._brain)
        unknown = {n for n in left_out if not _is_statistics(own[n]) and not callable(own[n])}
        new = unknown - self._told
        if new:
            logger.info(
                "self.%s, which on_stage_start has made, is not saved within an epoch: it is "
                "made of more than numbers, texts and tensors.",
                ", self.".join(sorted(new)),
            )
        self._told |= new


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _statistics(owner: Mapping[str, Any]) -> State:
    found = {name: value for name, value in owner.items() if _is_statistics(value)}
    return {
        name: [plain_values(vars(part)) for part in _parts(value)]
        for name, value in found.items()
    }


def _parts(statistics: Any) -> list[Any]:
    """A metric of torchmetrics may have others in it."""
    if isinstance(statistics, torch.nn.Module):
        return list(statistics.modules())
    return [statistics]


def _is_statistics(value: object) -> bool:
    of_speechbrain = is_statistics(value, "append", "summarize")
    return of_speechbrain or is_statistics(value, "update", "compute")
