"""Saves parameters by name if the parameter groups of ``init_optimizers`` change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

from torch.nn import Parameter
from torch.optim import Optimizer

from brain_lightning.distributed.ddp import plain_name
from brain_lightning.fsdp2.evaluate import release
from brain_lightning.protocol import BrainProtocol, parameters_of

from .active import all_optimizers

# Key of a saved parameter group: the names of its parameters.
NAMES = "brain_lightning_names"

Groups = Sequence[Sequence[Parameter]]


class InitialGroups:
    """Records the initial parameter groups of optimizers, which may change during training.

    torch raises an error if the groups of a state differ from those of the optimizer.
    Callbacks such as BackboneFinetuning, and recipes that unfreeze a part of the model or add
    adapters, change the groups during training. In that case parameters are saved by name,
    and an optimizer gets the groups of the checkpoint before it loads its state.

    Args:
        brain: The Brain.

    Attributes:
        frozen: Ids of the parameters that were frozen when the groups were created.
    """

    def __init__(self, brain: BrainProtocol) -> None:
        self._brain = brain
        self._made: WeakKeyDictionary[Optimizer, Groups] = WeakKeyDictionary()
        self.frozen: set[int] = set()

    def remember(self) -> None:
        """Records the current groups. Called after ``init_optimizers``."""
        for optimizer in all_optimizers(self._brain).values():
            self._made[optimizer] = _structure(optimizer)
            optimizer.register_state_dict_post_hook(self._name)
            optimizer.register_load_state_dict_pre_hook(self._restore)
        self.frozen = {id(p) for p in self._all() if not p.requires_grad}

    def forget_unfrozen(self) -> None:
        """Removes the parameters that are not frozen any more from ``frozen``."""
        if self.frozen:
            self.frozen -= {id(p) for p in self._all() if p.requires_grad}

    def _all(self) -> Iterator[Parameter]:
        for groups in self._made.values():
            yield from chain.from_iterable(groups)

    def made(self, optimizer: Optimizer) -> int:
        """Returns the initial number of groups of an optimizer, or the current one if unknown.

        Args:
            optimizer: An optimizer of the Brain.
        """
        return len(self._made.get(optimizer, optimizer.param_groups))

    def _name(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        if _same(_structure(optimizer), self._made[optimizer]):
            return
        names = {id(p): name for name, p in self._parameters(optimizer).items()}
        if all(id(p) in names for p in parameters_of(optimizer)):
            for group, saved in zip(
                optimizer.param_groups, state["param_groups"], strict=True
            ):
                saved[NAMES] = [names[id(p)] for p in group["params"]]

    def _restore(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        groups = self._saved(optimizer, state["param_groups"])
        if groups is not None and not _same(groups, _structure(optimizer)):
            optimizer.param_groups = [
                {**optimizer.defaults, "params": list(params)} for params in groups
            ]
            for parameter in chain.from_iterable(groups[self.made(optimizer) :]):
                parameter.requires_grad_(True)
        plain = [
            {k: v for k, v in group.items() if k != NAMES} for group in state["param_groups"]
        ]
        return {**state, "param_groups": plain}

    def _saved(self, optimizer: Optimizer, saved: Sequence[dict[str, Any]]) -> Groups | None:
        """Returns the parameters of saved groups, or None if torch cannot load the groups."""
        made, parameters = self._made[optimizer], self._parameters(optimizer)
        if not any(NAMES in group for group in saved):
            return made if len(made) == len(saved) else None
        groups: list[Sequence[Parameter]] = []
        for index, group in enumerate(saved):
            if NAMES not in group and index < len(made):
                # brain_lightning 0.1.0 saved names only for added groups.
                groups.append(made[index])
            elif parameters.keys() >= set(group.get(NAMES, [""])):
                groups.append([parameters[name] for name in group[NAMES]])
            else:
                return None
        return groups

    def _parameters(self, optimizer: Optimizer) -> dict[str, Parameter]:
        """Returns parameters by names that do not depend on wrapping and compilation.

        A parameter outside of all modules has its index in the initial groups as its name.
        """
        brain = self._brain
        release(brain)
        named = {plain_name(name, brain): p for name, p in brain.modules.named_parameters()}
        known = set(map(id, named.values()))
        others = enumerate(chain.from_iterable(self._made[optimizer]))
        return {**{str(i): p for i, p in others if id(p) not in known}, **named}


def _structure(optimizer: Optimizer) -> Groups:
    return [list(group["params"]) for group in optimizer.param_groups]


def _same(one: Groups, other: Groups) -> bool:
    return [list(map(id, group)) for group in one] == [list(map(id, g)) for g in other]
