"""Saves and restores attributes of modules that training changes, apart from state dicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from brain_lightning.distributed.ddp import plain_name
from brain_lightning.protocol import BrainProtocol

Attributes = dict[str, Any]

# The mode, a switch, and what ``process_state.synchronizes`` saves.
_SAVED_ELSEWHERE = ("training", "track_running_stats", "require_forward_param_sync")


def module_attributes(brain: BrainProtocol) -> Attributes:
    """Returns the attributes of modules that training may change.

    Args:
        brain: The Brain.

    Returns:
        By names that do not depend on wrapping and compilation: ``requires_grad`` of each
        parameter and ``track_running_stats`` of each normalization layer, which
        BaseFinetuning changes, and numbers and flags, such as ``drop_mask_cnt`` of
        SpeechBrain's LiGRU.
    """
    return {
        plain_name(name, brain): getattr(owner, attribute)
        for name, owner, attribute in (*_switches(brain), *_numbers(brain))
    }


def restore_module_attributes(brain: BrainProtocol, saved: Mapping[str, Any]) -> None:
    """Restores attributes of modules.

    Args:
        brain: The Brain.
        saved: Some values of ``module_attributes``.
    """
    for name, owner, attribute in [*_switches(brain), *_numbers(brain)]:
        if (plain := plain_name(name, brain)) in saved:
            setattr(owner, attribute, saved[plain])


class AttributeChanges:
    """The changes of ``module_attributes`` since the script has created the modules.

    The initial values are not saved, because the script sets them when it is started again,
    possibly to others.

    Args:
        brain: The Brain.
    """

    def __init__(self, brain: BrainProtocol) -> None:
        self._brain = brain
        self.remember()

    def remember(self) -> None:
        """Records the attributes when the optimizers are created.

        A number that an earlier run of the Brain has changed keeps its first value, because a
        script that is started again does not repeat a run that is over.
        """
        initial = module_attributes(self._brain)
        first = self._brain._lightning.initial_numbers
        for name, _, _ in _numbers(self._brain):
            plain = plain_name(name, self._brain)
            initial[plain] = first.setdefault(plain, initial[plain])
        self._initial = initial

    def changed(self, now: Attributes) -> Attributes:
        """Returns the attributes that differ from the recorded ones.

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


def _numbers(brain: BrainProtocol) -> Iterator[tuple[str, Any, str]]:
    """Yields each number and flag of a module, except the mode and those of wrappers."""
    for name, module in brain.modules.named_modules():
        if isinstance(module, DistributedDataParallel):
            continue
        for attribute, value in vars(module).items():
            is_number = type(value) in (bool, int, float)
            if is_number and attribute not in _SAVED_ELSEWHERE:
                yield f"{name}.{attribute}", module, attribute
