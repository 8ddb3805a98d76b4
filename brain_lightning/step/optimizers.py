"""The optimizers of a Brain: which there are, and one group of all of them."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any

from torch.nn import Module, Parameter
from torch.optim import Optimizer

from brain_lightning.protocol import BrainProtocol


def all_optimizers(brain: BrainProtocol) -> dict[str, Optimizer]:
    """Every optimizer of a Brain, as it is now: recipes replace them during a run.

    Args:
        brain: The Brain after ``init_optimizers``.

    Returns:
        ``optimizers_dict``; where an older ``init_optimizers`` does not fill
        it, ``optimizer`` alone (``speechbrain.Brain.optimizers_step``).
    """
    if brain.optimizers_dict is not None:
        return brain.optimizers_dict
    optimizer = getattr(brain, "optimizer", None)
    if brain.opt_class is None or optimizer is None:
        return {}
    return {"optimizer": optimizer}


def has_optimizer(brain: BrainProtocol) -> bool:
    """Whether a Brain has an optimizer, if only as an attribute that it steps itself.

    Args:
        brain: The Brain after ``init_optimizers``.
    """
    own = any(isinstance(value, Optimizer) for value in vars(brain).values())
    return own or bool(all_optimizers(brain))


def active_optimizers(brain: BrainProtocol) -> Mapping[str, Optimizer]:
    """The optimizers that ``freeze_optimizers`` leaves active now.

    Args:
        brain: The Brain after ``init_optimizers``.

    Returns:
        Optimizers by name, in the order in which they step.
    """
    if brain.optimizers_dict is not None:
        return brain.freeze_optimizers(brain.optimizers_dict)
    return all_optimizers(brain)


def parameters_of(optimizer: Optimizer) -> list[Parameter]:
    """All parameters of an optimizer, over all its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def split_vectors_from_weight_decay(modules: Module) -> list[dict[str, Any]]:
    """Parameter groups in which vectors, such as biases and norms, do not decay.

    Args:
        modules: The modules to optimize.

    Returns:
        Two groups, the one without decay first
        (``speechbrain.utils.optimizers.rm_vector_weight_decay``).
    """
    trainable = [p for p in modules.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.dim() == 1], "weight_decay": 0.0},
        {"params": [p for p in trainable if p.dim() != 1]},
    ]


class OptimizerGroup(Optimizer):
    """A Brain's optimizers as the one optimizer of Lightning's automatic optimization.

    It has no state: ``param_groups`` are views of the members' groups, named after
    the member for a LearningRateMonitor; members are looked up at each use, and
    ``step`` steps those in ``active``, through the Brain's scaler. So a recipe uses
    its torch optimizers as before.

    Args:
        brain: The Brain whose optimizers these are.
    """

    def __init__(self, brain: BrainProtocol) -> None:
        self._brain = brain
        self.active: Mapping[str, Optimizer] = {}
        # torch requires a parameter group; the setter below ignores an empty one.
        super().__init__([{"params": []}], {})

    @property
    def members(self) -> dict[str, Optimizer]:
        """The optimizers by name."""
        return all_optimizers(self._brain)

    @property
    def param_groups(self) -> list[Any]:
        """The members' parameter groups; changing one changes the member."""
        return [
            ChainMap(group, {"name": name if not index else f"{name}/{index}"})
            for name, member in self.members.items()
            for index, group in enumerate(member.param_groups)
        ]

    @param_groups.setter
    def param_groups(self, value: list[Any]) -> None:
        """Ignores what BackboneFinetuning restores, for ``AddedGroups`` has, and ``[]``."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Gives the last member another group, as BackboneFinetuning asks for.

        Args:
            param_group: Parameters, and options of that member.
        """
        if param_group["params"]:
            list(self.members.values())[-1].add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps the active members.

        Args:
            closure: Called first, as torch's optimizers do; Lightning clips in it.

        Returns:
            What the closure returned.
        """
        result = None if closure is None else closure()
        for member in self.active.values():
            self._brain.scaler.step(member)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes the gradients of every member."""
        for member in self.members.values():
            member.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The members' states by name."""
        return {name: member.state_dict() for name, member in self.members.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what ``state_dict`` gave.

        Args:
            state_dict: One state for each member.

        Raises:
            KeyError: A member has no state in it.
        """
        for name, member in self.members.items():
            member.load_state_dict(state_dict[name])


# torch would otherwise call its global step hooks for the group too, after each member's.
OptimizerGroup.step.hooked = True  # type: ignore[attr-defined]
