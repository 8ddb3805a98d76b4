"""Parameter groups that are added to an optimizer while it trains, saved by name."""

from __future__ import annotations

from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer

from brain_lightning.protocol import BrainProtocol

from .compile import plain_name
from .optimizers import all_optimizers

# In a saved parameter group that was added: the names of its parameters.
NAMES = "brain_lightning_names"


class AddedGroups:
    """Remembers the groups that are added to optimizers from now on.

    torch refuses to load the state of more groups than an optimizer has. Callbacks such as
    BackboneFinetuning, and recipes that unfreeze a part of the model, add groups in the
    middle of a training; those that are in a checkpoint are added before it is loaded, and
    their parameters are trained again.

    Args:
        brain: The Brain after ``init_optimizers``.
    """

    def __init__(self, brain: BrainProtocol) -> None:
        self._brain = brain
        optimizers = all_optimizers(brain).values()
        self._first = {id(each): len(each.param_groups) for each in optimizers}
        for optimizer in optimizers:
            optimizer.register_state_dict_post_hook(self._name)
            optimizer.register_load_state_dict_pre_hook(self._add)

    def _name(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        first = self._first[id(optimizer)]
        added = optimizer.param_groups[first:]
        if not added:
            return
        names = {id(p): name for name, p in self._parameters().items()}
        for group, saved in zip(added, state["param_groups"][first:], strict=True):
            if all(id(p) in names for p in group["params"]):
                saved[NAMES] = [names[id(p)] for p in group["params"]]

    def _add(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        parameters, groups = self._parameters(), state["param_groups"]
        for group in groups[len(optimizer.param_groups) :]:
            if not parameters.keys() >= set(group.get(NAMES, [""])):
                # torch will refuse it.
                break
            params = [parameters[name].requires_grad_(True) for name in group[NAMES]]
            optimizer.add_param_group({"params": params})
        plain = [{k: v for k, v in group.items() if k != NAMES} for group in groups]
        return {**state, "param_groups": plain}

    def _parameters(self) -> dict[str, Parameter]:
        """By names that are the same where modules are wrapped or compiled."""
        brain = self._brain
        return {plain_name(name, brain): p for name, p in brain.modules.named_parameters()}
