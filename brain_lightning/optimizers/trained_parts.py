"""Saves and restores which parts of the modules are trained, if that changes during a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from brain_lightning.distributed.ddp import plain_name
from brain_lightning.protocol import BrainProtocol

Switches = dict[str, bool]


def switches(brain: BrainProtocol) -> Switches:
    """Returns which parameters are trained and which normalization layers track statistics.

    BaseFinetuning freezes and unfreezes both.

    Args:
        brain: The Brain.

    Returns:
        ``requires_grad`` of each parameter and ``track_running_stats`` of each normalization
        layer, by names that do not depend on wrapping and compilation.
    """
    return {
        plain_name(name, brain): getattr(owner, attribute)
        for name, owner, attribute in _switches(brain)
    }


class TrainedParts:
    """The changes of ``switches`` since the optimizers were created.

    Parameters that a script freezes at its start are not saved, because the script freezes
    them again when it is started again. Later changes by callbacks and hooks are saved.

    Args:
        brain: The Brain.
    """

    def __init__(self, brain: BrainProtocol) -> None:
        self._brain = brain
        self.remember()

    def remember(self) -> None:
        """Records the switches that are off now. All other switches are on."""
        self._frozen = {
            plain_name(name, self._brain)
            for name, owner, attribute in _switches(self._brain)
            if not getattr(owner, attribute)
        }

    def changed(self, now: Switches) -> Switches:
        """Returns the switches that differ from the recorded ones.

        Args:
            now: Current switches, from ``switches``.
        """
        return {name: on for name, on in now.items() if on == (name in self._frozen)}

    def restore(self, changed: Mapping[str, bool]) -> None:
        """Restores the switches that had changed when the run was saved.

        Args:
            changed: Return value of ``changed``.
        """
        for name, owner, attribute in _switches(self._brain):
            if (plain := plain_name(name, self._brain)) in changed:
                setattr(owner, attribute, changed[plain])


def _switches(brain: BrainProtocol) -> Iterator[tuple[str, Any, str]]:
    """Yields each switch: its name in the modules, its owner and its attribute."""
    for name, parameter in brain.modules.named_parameters():
        yield f"{name}.requires_grad", parameter, "requires_grad"
    for name, module in brain.modules.named_modules():
        if (attribute := "track_running_stats") in vars(module):
            yield f"{name}.{attribute}", module, attribute
