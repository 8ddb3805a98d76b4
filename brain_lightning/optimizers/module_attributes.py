"""Saves and restores attributes of modules that training changes, apart from state dicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from brain_lightning.compat.speechbrain import COUNTERS
from brain_lightning.distributed.ddp import plain_name
from brain_lightning.protocol import BrainProtocol

Attributes = dict[str, Any]


def module_attributes(brain: BrainProtocol) -> Attributes:
    """Returns the attributes of modules that training may change.

    Args:
        brain: The Brain.

    Returns:
        By names that do not depend on wrapping and compilation: ``requires_grad`` of each
        parameter and ``track_running_stats`` of each normalization layer, which
        BaseFinetuning changes, and ``compat.speechbrain.COUNTERS``. Other numbers and flags
        are not among them: they may belong to a cache that no checkpoint has.
    """
    return {
        plain_name(name, brain): getattr(owner, attribute)
        for name, owner, attribute in (*_switches(brain), *_counters(brain))
    }


def restore_module_attributes(brain: BrainProtocol, saved: Mapping[str, Any]) -> None:
    """Restores attributes of modules.

    Args:
        brain: The Brain.
        saved: Some values of ``module_attributes``.
    """
    for name, owner, attribute in [*_switches(brain), *_counters(brain)]:
        if (plain := plain_name(name, brain)) in saved:
            setattr(owner, attribute, saved[plain])


class AttributeChanges:
    """The changes of ``module_attributes`` since the optimizers were created.

    Parameters that a script freezes at its start are not saved, because the script freezes
    them again when it is started again. Later changes by callbacks and hooks are saved, and
    counters always are.

    Args:
        brain: The Brain.
    """

    def __init__(self, brain: BrainProtocol) -> None:
        self._brain = brain
        self.remember()

    def remember(self) -> None:
        """Records the switches."""
        self._initial = {
            plain_name(name, self._brain): getattr(owner, attribute)
            for name, owner, attribute in _switches(self._brain)
        }

    def changed(self, now: Attributes) -> Attributes:
        """Returns the attributes that differ from the recorded ones, and all counters.

        Args:
            now: Current attributes, from ``module_attributes``.
        """
        return {name: value for name, value in now.items() if self._initial.get(name) != value}


def _switches(brain: BrainProtocol) -> Iterator[tuple[str, Any, str]]:
    """Yields each switch: its name in the modules, its owner and its attribute."""
    for name, parameter in brain.modules.named_parameters():
        yield f"{name}.requires_grad", parameter, "requires_grad"
    for name, module in brain.modules.named_modules():
        if (attribute := "track_running_stats") in vars(module):
            yield f"{name}.{attribute}", module, attribute


def _counters(brain: BrainProtocol) -> Iterator[tuple[str, Any, str]]:
    """Yields each counter of SpeechBrain's modules."""
    for name, module in brain.modules.named_modules():
        if COUNTERS[0] in vars(module):
            for attribute in vars(module).keys() & set(COUNTERS):
                yield f"{name}.{attribute}", module, attribute
