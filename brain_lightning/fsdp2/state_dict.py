"""What is saved of sharded modules and of their optimizers is whole, as under DDP.

``state_dict`` has whole tensors in the main process, on the CPU, and shards in the others:
all processes call it together. ``load_state_dict`` takes both, and each process takes its
part of a whole tensor without communication. So whoever saves, a Checkpointer, SpeechBrain's,
a Trainer or a recipe itself, writes the file that it would write under DDP.
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
# Parts of sharded modules, which have weights of their own.
_sharded: WeakSet[Module] = WeakSet()
# Within ``made_whole``: by the id of the parameter.
_made: dict[int, Tensor] = {}
# Within ``as_shards``.
_as_shards: list[None] = []


def save_whole_module(module: Module) -> None:
    """Makes a module save and load whole tensors.

    Args:
        module: Sharded, and ready for use.
    """
    for part in module.modules():
        if part not in _sharded and any(map(is_shard, part.parameters(recurse=False))):
            _sharded.add(part)
            part.register_state_dict_post_hook(_gather)  # type: ignore[no-untyped-call]
            part.register_load_state_dict_pre_hook(_shard)  # type: ignore[no-untyped-call]


def save_whole_optimizers(objects: Iterable[object]) -> list[Optimizer]:
    """Makes optimizers save and load whole tensors, where they have sharded parameters.

    Args:
        objects: Optimizers among others; those that do already stay as they are.

    Returns:
        Those that did not.
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
    """Whether the ``state_dict`` of an object is made by all processes together.

    Args:
        obj: Anything.
    """
    if isinstance(obj, Module):
        # Where weights are whole, it releases them.
        return any(part in _sharded for part in obj.modules())
    # A recipe may have made it by itself, and only now.
    save_whole_optimizers([obj])
    return isinstance(obj, Optimizer) and obj in _watched


@contextmanager
def made_whole(obj: Any) -> Iterator[None]:
    """A context in which ``state_dict`` has whole tensors without communication.

    All processes enter it together, for a function that saves the module its own way, in the
    main process alone perhaps.

    Args:
        obj: A module, or a part of one; with anything else nothing happens.

    Yields:
        None
    """
    state = obj.state_dict(keep_vars=True) if is_saved_together(obj) else {}
    for parameter in state.values():
        if is_shard(parameter):
            whole = on_main(parameter.detach())
            _made[id(parameter)] = whole.requires_grad_(parameter.requires_grad)
    try:
        yield
    finally:
        _made.clear()


@contextmanager
def as_shards() -> Iterator[None]:
    """A context in which a ``state_dict`` has shards, without communication."""
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
        # With keep_vars=True they are asked for as they are.
        as_they_are = isinstance(state[key], Parameter)
        if id(parameter) in _made:
            made = _made[id(parameter)]
            state[key] = made if as_they_are else made.detach()
        elif not as_they_are:
            state[key] = _gathered_once(parameter, key, state)


# The state that is made, and in it the first name of each parameter.
_names: list[tuple[Any, dict[int, str]]] = []


def _gathered_once(parameter: Tensor, key: str, state: dict[str, Any]) -> Any:
    """A whole weight; one that has several names is in memory once, as under DDP."""
    if type(state) is dict:
        # A destination of the caller's, to which nothing can refer.
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
    # Its dictionaries are those of the optimizer: they are copied.
    gathered: dict[Any, Any] = {
        index: {name: on_main(value) for name, value in found.items()}
        for index, found in sorted(state["state"].items())
    }
    return {**state, "state": {index: gathered[index] for index in state["state"]}}


def parameters_by_index(optimizer: Optimizer, state: dict[str, Any]) -> dict[Any, Any]:
    """The parameters of an optimizer, by their indices in a state that it is to load.

    Args:
        optimizer: The optimizer.
        state: The state.
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
