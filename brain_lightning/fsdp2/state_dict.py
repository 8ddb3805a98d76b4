"""What is saved of sharded modules and of their optimizers is whole, as under DDP.

``state_dict`` has whole tensors in the main process, on the CPU, and shards in the others:
all processes call it together. ``load_state_dict`` takes both, and each process takes its
part of a whole tensor without communication. So whoever saves, a Checkpointer, SpeechBrain's,
a Trainer or a recipe itself, writes the file that it would write under DDP.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

from torch.nn import Module, Parameter
from torch.optim import Optimizer

from .tensors import is_shard, like, on_main

_watched: WeakSet[Optimizer] = WeakSet()


def save_whole_module(module: Module) -> None:
    """Makes a module save and load whole tensors.

    Args:
        module: Sharded, and ready for use.
    """
    for part in module.modules():
        if any(map(is_shard, part.parameters(recurse=False))):
            part.register_state_dict_post_hook(_gather)  # type: ignore[no-untyped-call]
            part.register_load_state_dict_pre_hook(_shard)  # type: ignore[no-untyped-call]


def save_whole_optimizers(optimizers: Iterable[Optimizer]) -> None:
    """Makes optimizers save and load whole tensors, where they have sharded parameters.

    Args:
        optimizers: The optimizers; those that do already stay as they are.
    """
    for optimizer in optimizers:
        if optimizer not in _watched and any(map(is_shard, _parameters(optimizer))):
            _watched.add(optimizer)
            optimizer.register_state_dict_post_hook(_gather_state)
            optimizer.register_load_state_dict_pre_hook(_shard_state)


def is_saved_together(obj: object) -> bool:
    """Whether the ``state_dict`` of an object is made by all processes together.

    Args:
        obj: Anything.
    """
    if isinstance(obj, Module):
        return any(map(is_shard, obj.state_dict(keep_vars=True).values()))
    return isinstance(obj, Optimizer) and obj in _watched


def _parameters(optimizer: Optimizer) -> Iterable[Any]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _gather(module: Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    for name, _ in module.named_parameters(recurse=False, remove_duplicate=False):
        key = f"{prefix}{name}"
        # With keep_vars=True they are asked for as they are.
        if key in state and not isinstance(state[key], Parameter):
            state[key] = on_main(state[key])


def _shard(module: Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        key = f"{prefix}{name}"
        if key in state:
            state[key] = like(state[key], parameter)


def _gather_state(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    # Its dictionaries are those of the optimizer: they are copied.
    gathered: dict[Any, Any] = {
        index: {name: on_main(value) for name, value in found.items()}
        for index, found in sorted(state["state"].items())
    }
    return {**state, "state": {index: gathered[index] for index in state["state"]}}


def _shard_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    saved = [index for group in state["param_groups"] for index in group["params"]]
    parameters = dict(zip(saved, _parameters(optimizer), strict=False))
    sharded = {
        index: {name: like(value, parameters[index]) for name, value in found.items()}
        if index in parameters
        else found
        for index, found in state["state"].items()
    }
    return {**state, "state": sharded}
