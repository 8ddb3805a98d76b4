"""Which parts of the modules are trained, where that has changed within a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from brain_lightning.distributed.ddp import plain_name
from brain_lightning.protocol import BrainProtocol

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
    return {
        plain_name(name, brain): getattr(owner, attribute)
        for name, owner, attribute in _switches(brain)
    }


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
        """Remembers what is not trained now: the rest, nearly all, is found by looking."""
        self._frozen = {
            plain_name(name, self._brain)
            for name, owner, attribute in _switches(self._brain)
            if not getattr(owner, attribute)
        }

    def changed(self, now: Switches) -> Switches:
        """What is other than at first.

        Args:
            now: From ``switches``.
        """
        return {name: on for name, on in now.items() if on == (name in self._frozen)}

    def restore(self, changed: Mapping[str, bool]) -> None:
        """Restores what had changed when the run was saved.

        Args:
            changed: From ``changed``.
        """
        for name, owner, attribute in _switches(self._brain):
            if (plain := plain_name(name, self._brain)) in changed:
                setattr(owner, attribute, changed[plain])


def _switches(brain: BrainProtocol) -> Iterator[tuple[str, Any, str]]:
    """Each switch: its name as the modules have it, its owner and its attribute."""
    for name, parameter in brain.modules.named_parameters():
        yield f"{name}.requires_grad", parameter, "requires_grad"
    for name, module in brain.modules.named_modules():
        if (attribute := "track_running_stats") in vars(module):
            yield f"{name}.{attribute}", module, attribute
