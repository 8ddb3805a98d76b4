"""What the hooks of a recipe accumulate on their Brain in an epoch that is not over."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch

from brain_lightning.protocol import BrainProtocol, OptionValues, hparams_of, is_statistics

from .plain_values import State, plain_values, restore_attributes

logger = logging.getLogger(__name__)

# What the run itself keeps, and saves elsewhere; a hook may raise the patience.
OWN = {*BrainProtocol.__annotations__, *OptionValues.__annotations__} - {"nonfinite_patience"}


class EpochStatistics:
    """The attributes in which a Brain accumulates statistics while it trains one epoch.

    These are what ``on_stage_start(TRAIN)`` has assigned, numbers that have changed
    since, and objects with SpeechBrain's or torchmetrics' interface for statistics.

    Args:
        brain: The Brain, before ``on_stage_start``.
    """

    def __init__(self, brain: BrainProtocol) -> None:
        self._brain = brain
        self._before = {name: id(value) for name, value in vars(brain).items()}
        self._assigned: set[str] = set()
        self._numbers: State = {}
        self._reported: set[str] = set()

    def begin(self) -> None:
        """Records what ``on_stage_start`` has assigned."""
        own = {name: value for name, value in vars(self._brain).items() if name not in OWN}
        self._assigned = {name for name in own if self._before.get(name) != id(own[name])}
        self._numbers = {name: value for name, value in own.items() if _is_number(value)}

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
        self._report(values.keys() - saved.keys())
        owners = self._owners().items()
        return {"values": saved, **{key: _statistics(owner) for key, owner in owners}}

    def restore(self, state: State) -> None:
        """Restores what the Brain had accumulated.

        Args:
            state: What ``state`` returned.
        """
        restore_attributes(self._brain, state["values"])
        for key, owner in self._owners().items():
            for name, values in state[key].items():
                if _accumulates(owner.get(name)):
                    for part, attributes in zip(_parts(owner[name]), values, strict=False):
                        restore_attributes(part, attributes)

    def _owners(self) -> dict[str, dict[str, Any]]:
        return {"brain": vars(self._brain), "hparams": hparams_of(self._brain)}

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


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _statistics(owner: Mapping[str, Any]) -> State:
    return {
        name: [plain_values(vars(part)) for part in _parts(value)]
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
