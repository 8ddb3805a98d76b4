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
from weakref import WeakKeyDictionary, WeakSet, ref

from torch.nn import Module, Parameter
from torch.optim import Optimizer

from brain_lightning.compat.versions import FSDPModule

from .tensors import is_shard, like, on_main

_watched: WeakSet[Optimizer] = WeakSet()
# By each part of a sharded module what gathers and releases its weights.
_gatherers: WeakKeyDictionary[Module, Any] = WeakKeyDictionary()
# Within ``as_shards``.
_as_shards: list[None] = []


def save_whole_module(module: Module) -> None:
    """Makes a module save and load whole tensors.

    Args:
        module: Sharded, and ready for use.
    """
    for owner, part in _with_owners(module, module):
        is_new = part not in _gatherers
        if is_new and any(is_shard(p) for p in part._parameters.values()):
            _gatherers[part] = ref(owner)
            part.register_state_dict_post_hook(_gather)  # type: ignore[no-untyped-call]
            part.register_load_state_dict_pre_hook(_shard)  # type: ignore[no-untyped-call]


def _with_owners(owner: Module, module: Module) -> Iterator[tuple[Module, Module]]:
    """Each part of a module, with the innermost module that gathers its weights."""
    owner = module if isinstance(module, FSDPModule) else owner
    yield owner, module
    for child in module.children():
        yield from _with_owners(owner, child)


def save_whole_optimizers(objects: Iterable[object]) -> None:
    """Makes optimizers save and load whole tensors, where they have sharded parameters.

    Args:
        objects: Optimizers among others; those that do already stay as they are.
    """
    for each in objects:
        if not isinstance(each, Optimizer) or each in _watched:
            continue
        if any(map(is_shard, _parameters(each))):
            _watched.add(each)
            each.register_state_dict_post_hook(_gather_state)
            each.register_load_state_dict_pre_hook(_shard_state)


def is_saved_together(obj: object) -> bool:
    """Whether the ``state_dict`` of an object is made by all processes together.

    Args:
        obj: Anything.
    """
    if isinstance(obj, Module):
        return bool(_gatherers_of(obj))
    # A recipe may have made it by itself, and only now.
    save_whole_optimizers([obj])
    return isinstance(obj, Optimizer) and obj in _watched


def release_weights(obj: object) -> None:
    """Releases weights that are whole, and in larger memory, which would be saved with them.

    Args:
        obj: A module, or a part of one; with anything else nothing happens.
    """
    for each in _gatherers_of(obj) if isinstance(obj, Module) else ():
        each.reshard()


@contextmanager
def whole_weights(obj: object) -> Iterator[None]:
    """A context in which the weights of a module are whole in all processes.

    All of them enter it together, for a function that saves the module its own way, in one
    process alone perhaps.

    Args:
        obj: A module, or a part of one; with anything else nothing happens.

    Yields:
        None
    """
    gatherers = _gatherers_of(obj) if isinstance(obj, Module) else []
    try:
        for each in gatherers:
            each.unshard()
        yield
    finally:
        for each in gatherers:
            each.reshard()


def _gatherers_of(module: Module) -> list[Any]:
    """What gathers the weights of a module, or of parts of it."""
    found = [_gatherers[part]() for part in module.modules() if part in _gatherers]
    return list(dict.fromkeys(found))


@contextmanager
def as_shards() -> Iterator[None]:
    """A context in which a ``state_dict`` has shards, without communication."""
    _as_shards.append(None)
    try:
        yield
    finally:
        _as_shards.pop()


def _parameters(optimizer: Optimizer) -> Iterable[Any]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _gather(module: Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in module._parameters:
        key = f"{prefix}{name}"
        # With keep_vars=True they are asked for as they are.
        if key in state and not isinstance(state[key], Parameter) and not _as_shards:
            state[key] = on_main(state[key])


def _shard(module: Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in module._parameters.items():
        key = f"{prefix}{name}"
        if key in state and parameter is not None:
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
    return dict(zip(saved, _parameters(optimizer), strict=False))


def _shard_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    parameters = parameters_by_index(optimizer, state)
    sharded = {
        index: {name: like(value, parameters[index]) for name, value in found.items()}
        if index in parameters
        else found
        for index, found in state["state"].items()
    }
    return {**state, "state": sharded}
