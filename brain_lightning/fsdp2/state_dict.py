"""Makes sharded modules and their optimizers save and load full tensors, as under DDP.

All ranks call ``state_dict`` together. It returns full tensors on the CPU on rank 0, and
shards on the other ranks. ``load_state_dict`` takes both: each rank takes its part of a full
tensor without communication. A file that brain_lightning's or SpeechBrain's Checkpointer, a
Trainer or a recipe saves is therefore the same as under DDP.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet, ref

from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from brain_lightning.protocol import parameters_of

from .tensors import is_shard, like, on_main

_watched: WeakSet[Optimizer] = WeakSet()
# Modules with hooks: those that directly own a sharded parameter.
_sharded: WeakSet[Module] = WeakSet()
# Full tensors by the id of their parameter. Empty outside of ``with_full_states``.
_full_tensors: dict[int, Tensor] = {}
# Not empty within ``as_shards``.
_as_shards: list[None] = []


def save_full_module(module: Module) -> None:
    """Registers hooks with which a module saves and loads full tensors.

    Args:
        module: Sharded and initialized module.
    """
    for part in module.modules():
        if part not in _sharded and any(map(is_shard, part.parameters(recurse=False))):
            _sharded.add(part)
            part.register_state_dict_post_hook(_gather)  # type: ignore[no-untyped-call]
            part.register_load_state_dict_pre_hook(_shard)  # type: ignore[no-untyped-call]


def save_full_optimizers(objects: Iterable[object]) -> list[Optimizer]:
    """Registers hooks with which optimizers of sharded parameters save and load full tensors.

    Args:
        objects: Any objects. Objects that are not optimizers of sharded parameters, and
            optimizers that have the hooks already, are ignored.

    Returns:
        The optimizers that got the hooks in this call.
    """
    new: list[Optimizer] = []
    for each in objects:
        if not isinstance(each, Optimizer) or each in _watched:
            continue
        if any(map(is_shard, parameters_of(each))):
            _watched.add(each)
            each.register_state_dict_post_hook(_gather_state)
            each.register_load_state_dict_pre_hook(_shard_state)
            new.append(each)
    return new


def is_saved_together(obj: object) -> bool:
    """Returns whether all ranks have to call ``state_dict`` of an object together.

    Args:
        obj: Any object.
    """
    if isinstance(obj, Module):
        # Not is_shard: weights may be gathered now, and state_dict releases them.
        return any(part in _sharded for part in obj.modules())
    # The recipe may have created the optimizer since the hooks were registered.
    save_full_optimizers([obj])
    return isinstance(obj, Optimizer) and obj in _watched


@contextmanager
def with_full_states(obj: Any) -> Iterator[None]:
    """Context manager in which ``state_dict`` returns full tensors without communication.

    It is for custom save functions, which may run on rank 0 only. All ranks enter it together.

    Args:
        obj: A module or a part of one. For any other object nothing happens.

    Yields:
        None
    """
    state = obj.state_dict(keep_vars=True) if is_saved_together(obj) else {}
    for parameter in state.values():
        if is_shard(parameter):
            whole = on_main(parameter.detach())
            _full_tensors[id(parameter)] = whole.requires_grad_(parameter.requires_grad)
    try:
        yield
    finally:
        _full_tensors.clear()


@contextmanager
def as_shards() -> Iterator[None]:
    """Context manager in which ``state_dict`` returns shards, without communication."""
    _as_shards.append(None)
    try:
        yield
    finally:
        _as_shards.pop()


def _gather(module: Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        key = f"{prefix}{name}"
        if key not in state or _as_shards:
            continue
        # With keep_vars=True the caller asks for the parameters themselves.
        as_they_are = isinstance(state[key], Parameter)
        if id(parameter) in _full_tensors:
            made = _full_tensors[id(parameter)]
            state[key] = made if as_they_are else made.detach()
        elif not as_they_are:
            state[key] = _gathered_once(parameter, key, state)


# The state that is being built, and the first key of each parameter in it.
_names: list[tuple[Any, dict[int, str]]] = []


def _gathered_once(parameter: Tensor, key: str, state: dict[str, Any]) -> Any:
    """Returns the full weight. A weight with several names is gathered once, as under DDP."""
    if type(state) is dict:
        # The caller passed a plain dict as destination, which has no weak references.
        return on_main(state[key])
    if not _names or _names[0][0]() is not state:
        _names[:] = [(ref(state), {})]
    first = _names[0][1].setdefault(id(parameter), key)
    return on_main(state[key]) if first == key else state[first].detach()


def _shard(module: Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        key = f"{prefix}{name}"
        if key in state:
            state[key] = like(state[key], parameter)


def _gather_state(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    if _as_shards:
        return state
    # The dictionaries belong to the optimizer, so they are copied.
    gathered: dict[Any, Any] = {
        index: {name: on_main(value) for name, value in found.items()}
        for index, found in sorted(state["state"].items())
    }
    return {**state, "state": {index: gathered[index] for index in state["state"]}}


def parameters_by_index(optimizer: Optimizer, state: dict[str, Any]) -> dict[Any, Any]:
    """Returns the parameters of an optimizer by their indices in a state that it will load.

    Args:
        optimizer: The optimizer.
        state: State dict of such an optimizer.
    """
    saved = [index for group in state["param_groups"] for index in group["params"]]
    return dict(zip(saved, parameters_of(optimizer), strict=False))


def _shard_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    parameters = parameters_by_index(optimizer, state)
    sharded = {
        index: {name: like(value, parameters[index]) for name, value in found.items()}
        if index in parameters
        else found
        for index, found in state["state"].items()
    }
    return {**state, "state": sharded}
