"""One optimizer that stands for all optimizers of a Brain, for the Trainer and callbacks."""

from __future__ import annotations

import functools
from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from brain_lightning.errors import CheckpointError, UnsupportedError
from brain_lightning.fsdp2.state_dict import save_full_optimizers
from brain_lightning.protocol import BrainProtocol, parameters_of

from .active import all_optimizers
from .initial_groups import InitialGroups


class GroupView(ChainMap[str, Any]):
    """A view of a parameter group of a member. A change of the view changes the group.

    Attributes:
        member: Name of the member.
        hidden: Ids of parameters in the group that the view does not show.
    """

    member: str
    hidden: Collection[int] = ()

    def __getitem__(self, key: str) -> Any:
        """Returns a value of the group. For ``params``, without the hidden parameters."""
        value = super().__getitem__(key)
        if key == "params" and self.hidden:
            return [p for p in value if id(p) not in self.hidden]
        return value


class GroupList(list[Any]):
    """A list of parameter groups. A change of the list is assigned to ``param_groups``.

    Args:
        groups: The groups.
        assign: Assigns the changed list.
    """

    def __init__(self, groups: Iterable[Any], assign: Callable[[list[Any]], None]) -> None:
        super().__init__(groups)
        self._assign = assign

    def __reduce__(self) -> tuple[Any, ...]:
        """Makes a copy a plain list."""
        return list, (list(self),)


def _assigning(name: str) -> Any:
    change = getattr(list, name)

    @functools.wraps(change)
    def changed(self: GroupList, *args: Any, **kwargs: Any) -> Any:
        result = change(self, *args, **kwargs)
        self._assign(self)
        return result

    return changed


for _name in (
    "append", "extend", "insert", "pop", "remove", "clear", "sort", "reverse",
    "__setitem__", "__delitem__", "__iadd__",
):  # fmt: skip
    setattr(GroupList, _name, _assigning(_name))


class OptimizerGroup(Optimizer):
    """A Brain's optimizers as the single optimizer of Lightning's automatic optimization.

    It has no state. It looks up its members (the Brain's optimizers) at each use, and
    ``step`` steps the members in ``active`` through the Brain's scaler. A recipe uses its
    torch optimizers as before.

    ``init_optimizers`` passes all parameters to an optimizer, whereas
    ``configure_optimizers`` of a LightningModule usually passes only those that are not
    frozen. Callbacks expect only these. Therefore parameters that were frozen at that time are
    hidden here until a callback adds them. From then on they are only in the added group.
    Parameters that are unfrozen but not added, such as normalization layers with
    ``train_bn=False``, are in no group.

    Args:
        brain: Brain with the optimizers.
        initial: The initial groups of the optimizers. Default: their current groups.
    """

    _initial: InitialGroups | None = None

    def __init__(self, brain: BrainProtocol, initial: InitialGroups | None = None) -> None:
        self._brain = brain
        self.active: Mapping[str, Optimizer] = {}
        # torch requires a parameter group. An empty group is added to no member.
        super().__init__([{"params": []}], {})
        self._initial = initial or InitialGroups(brain)

    @property
    def members(self) -> dict[str, Optimizer]:
        """The optimizers by name."""
        return all_optimizers(self._brain)

    @property
    def param_groups(self) -> list[Any]:
        """Views of the members' groups, with the member's name for LearningRateMonitor.

        Groups that were added come last, because BackboneFinetuning looks for them there.
        """
        views = sorted(self._views(), key=lambda numbered: numbered[0])
        return GroupList((view for _, view in views), self._assign)

    @param_groups.setter
    def param_groups(self, value: list[Any]) -> None:
        """Assigns to each member its own groups."""
        if self._initial is not None:
            self._assign(value)

    def _views(self) -> Iterable[tuple[int, GroupView]]:
        """Yields each group with its position among the added groups of its member, or 0."""
        for name, member in self.members.items():
            made = 0 if self._initial is None else self._initial.made(member)
            for index, group in enumerate(member.param_groups):
                view = GroupView(group, {"name": f"{name}/{index}" if index else name})
                view.member = name
                if index < made and self._initial is not None:
                    view.hidden = self._initial.frozen
                yield max(0, index + 1 - made), view

    def _assign(self, value: Iterable[Any]) -> None:
        assigned: dict[str, list[Any]] = {name: [] for name in self.members}
        new: list[dict[str, Any]] = []
        for given in value:
            name = self._member_of(given)
            if not isinstance(given, GroupView):
                new.append(_completed(given, name, self.members[name].defaults))
            assigned[name].append(given.maps[0] if isinstance(given, GroupView) else given)
        self._take_out(new)
        for name, groups in assigned.items():
            self.members[name].param_groups = groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the member that has its parameters, or otherwise to the last one.

        Args:
            param_group: Parameters, and options of that member.

        Raises:
            UnsupportedError: There is no member.
        """
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        if not params:
            return
        group = {**param_group, "params": params}
        member = self.members[self._member_of(group)]
        self._take_out([group])
        member.add_param_group(group)

    def _member_of(self, group: Mapping[str, Any]) -> str:
        members = self.members
        if isinstance(group, GroupView):
            return group.member
        if not members:
            raise UnsupportedError(
                "a parameter group was added to the Trainer's optimizer, but no optimizer of "
                "the Brain is known. Fill optimizers_dict in init_optimizers."
            )
        # The group may be a copy of a view, which has the member's name.
        name = str(group.get("name")).partition("/")[0]
        if name in members:
            return name
        own = set(map(id, _parameters_in(group)))
        has_some = (n for n, m in members.items() if own & set(map(id, parameters_of(m))))
        return next(has_some, list(members)[-1])

    def _take_out(self, new: list[dict[str, Any]]) -> None:
        """Removes frozen parameters that are being added from their initial groups."""
        frozen = set() if self._initial is None else self._initial.frozen
        added = {id(p) for group in new for p in _parameters_in(group)} & frozen
        for _, view in self._views() if added else ():
            group = view.maps[0]
            if view.hidden and not any(group is each for each in new):
                # In place, because LBFGS holds a reference to the list.
                group["params"][:] = [
                    p
                    for p in group["params"]
                    if id(p) not in frozen or not (id(p) in added or p.requires_grad)
                ]

    def show_unfrozen(self) -> None:
        """Shows parameters that were unfrozen in the last epoch and not added to a group."""
        if self._initial is not None:
            self._initial.forget_unfrozen()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps the active members.

        Args:
            closure: Called before the step, as by torch's optimizers. Lightning clips in it.

        Returns:
            Return value of the closure.
        """
        result = None if closure is None else closure()
        for member in self.active.values():
            self._brain.scaler.step(member)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes the gradients of all members."""
        for member in self.members.values():
            member.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of the members by name."""
        # A recipe may have replaced a member since.
        save_full_optimizers(self.members.values())
        return {name: member.state_dict() for name, member in self.members.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state from ``state_dict``.

        Args:
            state_dict: States of the members by name.

        Raises:
            CheckpointError: The state of a member is missing.
        """
        save_full_optimizers(self.members.values())
        for name, member in self.members.items():
            if name not in state_dict:
                raise CheckpointError(
                    f"the checkpoint has no state for the optimizer {name!r}, only for "
                    f"{', '.join(map(repr, state_dict)) or 'none'}. In optimizers_dict, use "
                    "the names that it had when the checkpoint was saved."
                )
            member.load_state_dict(state_dict[name])


# Otherwise torch would call its global step hooks for the group, too, after each member's.
OptimizerGroup.step.hooked = True  # type: ignore[attr-defined]


def _parameters_in(group: Mapping[str, Any]) -> list[Parameter]:
    """Returns the parameters of a group. torch also accepts (name, parameter) pairs."""
    return [each[1] if isinstance(each, tuple) else each for each in group["params"]]


def _completed(group: dict[str, Any], member: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """Fills missing options of a group in place, and removes the name that a view added."""
    if str(group.get("name")).partition("/")[0] == member:
        del group["name"]
    for option, value in defaults.items():
        group.setdefault(option, value)
    return group
