"""The optimizers of a Brain as one, for the Trainer and its callbacks."""

from __future__ import annotations

import functools
from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from brain_lightning.errors import CheckpointError, UnsupportedError
from brain_lightning.fsdp2.state_dict import save_whole_optimizers
from brain_lightning.protocol import BrainProtocol, parameters_of

from .active import all_optimizers
from .initial_groups import InitialGroups


class GroupView(ChainMap[str, Any]):
    """A parameter group of a member: changing it changes the member's.

    Attributes:
        member: The name of the member.
        hidden: The ids of parameters that it has, and does not show.
    """

    member: str
    hidden: Collection[int] = ()

    def __getitem__(self, key: str) -> Any:
        """A value of the group; of ``params`` those that are not hidden."""
        value = super().__getitem__(key)
        if key == "params" and self.hidden:
            return [p for p in value if id(p) not in self.hidden]
        return value


class GroupList(list[Any]):
    """Parameter groups; a change of the list is an assignment to ``param_groups``.

    Args:
        groups: The groups.
        assign: Assigns.
    """

    def __init__(self, groups: Iterable[Any], assign: Callable[[list[Any]], None]) -> None:
        super().__init__(groups)
        self._assign = assign

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is a list as any other."""
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
    """A Brain's optimizers as the one optimizer of Lightning's automatic optimization.

    It has no state: members are looked up at each use, and ``step`` steps those in
    ``active``, through the Brain's scaler. So a recipe uses its torch optimizers as before.

    ``init_optimizers`` gives an optimizer all parameters, and ``configure_optimizers`` of a
    LightningModule those that are not frozen. What was frozen then is not shown here, until
    a callback adds it: from then on it is in the group that was added, and in no other. What
    is unfrozen and not added then, such as norms by ``train_bn=False``, is in none.

    Args:
        brain: The Brain whose optimizers these are.
        initial: The groups that they began with; by default all that they have.
    """

    _initial: InitialGroups | None = None

    def __init__(self, brain: BrainProtocol, initial: InitialGroups | None = None) -> None:
        self._brain = brain
        self.active: Mapping[str, Optimizer] = {}
        # torch requires a parameter group; an empty one is added to no member.
        super().__init__([{"params": []}], {})
        self._initial = initial or InitialGroups(brain)

    @property
    def members(self) -> dict[str, Optimizer]:
        """The optimizers by name."""
        return all_optimizers(self._brain)

    @property
    def param_groups(self) -> list[Any]:
        """Views of the members' groups, named after the member for a LearningRateMonitor.

        Those that were added come last, where BackboneFinetuning looks for them.
        """
        views = sorted(self._views(), key=lambda numbered: numbered[0])
        return GroupList((view for _, view in views), self._assign)

    @param_groups.setter
    def param_groups(self, value: list[Any]) -> None:
        """Gives each member those groups that are its own."""
        if self._initial is not None:
            self._assign(value)

    def _views(self) -> Iterable[tuple[int, GroupView]]:
        """Each group, with its number among those that were added to its member, or 0."""
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
        """Adds a group to the member that has its parameters, or else to the last one.

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
                "a parameter group was added to the Trainer's optimizer, and the Brain has no "
                "optimizer that is known: fill optimizers_dict in init_optimizers"
            )
        # A copy of a view.
        name = str(group.get("name")).partition("/")[0]
        if name in members:
            return name
        own = set(map(id, _parameters_in(group)))
        has_some = (n for n, m in members.items() if own & set(map(id, parameters_of(m))))
        return next(has_some, list(members)[-1])

    def _take_out(self, new: list[dict[str, Any]]) -> None:
        """Takes frozen parameters that are added out of the groups that they were made in."""
        frozen = set() if self._initial is None else self._initial.frozen
        added = {id(p) for group in new for p in _parameters_in(group)} & frozen
        for _, view in self._views() if added else ():
            group = view.maps[0]
            if view.hidden and not any(group is each for each in new):
                # In place: LBFGS keeps the list.
                group["params"][:] = [
                    p
                    for p in group["params"]
                    if id(p) not in frozen or not (id(p) in added or p.requires_grad)
                ]

    def show_unfrozen(self) -> None:
        """Shows what was unfrozen in an epoch that is over, and not added: it is trained."""
        if self._initial is not None:
            self._initial.forget_unfrozen()

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
        # A recipe may have replaced one.
        save_whole_optimizers(self.members.values())
        return {name: member.state_dict() for name, member in self.members.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what ``state_dict`` gave.

        Args:
            state_dict: One state for each member.

        Raises:
            CheckpointError: A member has no state in it.
        """
        save_whole_optimizers(self.members.values())
        for name, member in self.members.items():
            if name not in state_dict:
                raise CheckpointError(
                    f"the checkpoint has no state for the optimizer {name!r}, but for "
                    f"{', '.join(map(repr, state_dict)) or 'none'}: optimizers_dict has to "
                    "have the names that it had when the checkpoint was saved"
                )
            member.load_state_dict(state_dict[name])


# torch would otherwise call its global step hooks for the group too, after each member's.
OptimizerGroup.step.hooked = True  # type: ignore[attr-defined]


def _parameters_in(group: Mapping[str, Any]) -> list[Parameter]:
    """The parameters of a group, of which torch also takes pairs with a name."""
    return [each[1] if isinstance(each, tuple) else each for each in group["params"]]


def _completed(group: dict[str, Any], member: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """The group itself, with the options that it lacks, and without the name of a view."""
    if str(group.get("name")).partition("/")[0] == member:
        del group["name"]
    for option, value in defaults.items():
        group.setdefault(option, value)
    return group
