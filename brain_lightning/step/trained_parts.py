"""Which parts of the modules are trained, where that has changed within a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from brain_lightning.protocol import BrainProtocol

from .compile import plain_name

Switches = dict[str, bool]


def switches(brain: BrainProtocol) -> Switches:
    """Whether parameters are trained, and statistics of norms tracked.

    BaseFinetuning freezes and unfreezes both.

    Args:
        brain: The Brain.

    Returns:
        ``requires_grad`` of each parameter, and ``track_running_stats`` of each norm, by
        names that are the same where modules are wrapped or compiled.
    """
    return {name: getattr(owner, attribute) for name, owner, attribute in _switches(brain)}


class TrainedParts:
    """What has changed of it since the optimizers were made.

    What a script freezes at its start it freezes in each process, or no longer, where
    somebody has changed it; what a callback or a hook changes later is saved.

    Args:
        brain: The Brain.
    """

    def __init__(self, brain: BrainProtocol) -> None:
        self._brain = brain
        self.remember()

    def remember(self) -> None:
        """Remembers what is trained now."""
        self._first = switches(self._brain)

    def changed(self, now: Switches) -> Switches:
        """What is other than at first.

        Args:
            now: From ``switches``.
        """
        first = self._first
        return {name: value for name, value in now.items() if first.get(name, True) != value}

    def restore(self, changed: Mapping[str, bool]) -> None:
        """Restores what had changed when the run was saved.

        Args:
            changed: From ``changed``.
        """
        for name, owner, attribute in _switches(self._brain):
            if name in changed:
                setattr(owner, attribute, changed[name])


def _switches(brain: BrainProtocol) -> Iterator[tuple[str, Any, str]]:
    for name, parameter in brain.modules.named_parameters():
        yield plain_name(f"{name}.requires_grad", brain), parameter, "requires_grad"
    for name, module in brain.modules.named_modules():
        if hasattr(module, attribute := "track_running_stats"):
            yield plain_name(f"{name}.{attribute}", brain), module, attribute
