"""What each of several processes has of its own in the modules, and saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from brain_lightning.distributed.communication import if_main_process, world_size
from brain_lightning.fsdp2.tensors import is_shard, on_main
from brain_lightning.protocol import BrainProtocol
from brain_lightning.step.window import Window, WindowState

# Stands for what only the state of the main process has.
IN_FIRST = "brain_lightning: in the state of the first process"


def buffers(brain: BrainProtocol) -> dict[int, Tensor]:
    """The buffers of the modules on the CPU, of which each process has its own.

    Args:
        brain: The Brain.
    """
    return {i: buffer.cpu() for i, buffer in enumerate(brain.modules.buffers())}


def restore_buffers(brain: BrainProtocol, saved: Mapping[int, Tensor]) -> None:
    """Restores buffers.

    Args:
        brain: The Brain.
        saved: Some of ``buffers``.
    """
    for index, buffer in enumerate(brain.modules.buffers()):
        if index in saved and saved[index].shape == buffer.shape:
            buffer.copy_(saved[index])


def differing(
    tensors: Mapping[int, Tensor], others: Mapping[int, Tensor]
) -> dict[int, Tensor]:
    """Those that another process has not.

    Args:
        tensors: Of one process.
        others: Of the other one, by the same indices.
    """
    return {i: tensor for i, tensor in tensors.items() if not torch.equal(tensor, others[i])}


def synchronizes(brain: BrainProtocol) -> list[bool]:
    """Whether the next forward pass makes the buffers those of the first process.

    It does after a backward pass that has averaged gradients, and not while they accumulate
    or after an evaluation.

    Args:
        brain: The Brain.

    Returns:
        For each wrapped module, in their order.
    """
    return [module.require_forward_param_sync for module in _wrapped(brain)]


def restore_synchronizes(brain: BrainProtocol, saved: list[bool]) -> None:
    """Restores it.

    Args:
        brain: The Brain.
        saved: From ``synchronizes``.
    """
    for module, value in zip(_wrapped(brain), saved, strict=False):
        module.require_forward_param_sync = value


def _wrapped(brain: BrainProtocol) -> list[Any]:
    """What is in DDP, or sharded and trained."""
    if world_size() == 1:
        return []
    modules = brain.modules.values()
    return [module for module in modules if hasattr(module, "require_forward_param_sync")]


def whole_in_first(state: Any) -> Any:
    """A state in which shards are whole in the main process, and left out in the others.

    Args:
        state: Dicts and lists of anything. All processes call this.
    """
    if is_shard(state):
        whole = on_main(state)
        return whole if if_main_process() else IN_FIRST
    if isinstance(state, dict):
        return {key: whole_in_first(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(whole_in_first, state))
    return state


def with_whole(state: Any, first: Any) -> Any:
    """The state of a process with what was left out of it.

    Args:
        state: From ``whole_in_first``, after it was saved.
        first: That of the main process.
    """
    if isinstance(state, str) and state == IN_FIRST:
        return first
    if isinstance(state, dict) and isinstance(first, dict):
        return {key: with_whole(value, first.get(key)) for key, value in state.items()}
    return state


def mean_gradients(states: Sequence[Any]) -> dict[int, Tensor]:
    """The average of the gradients of a window over processes.

    Args:
        states: Of all processes, within an epoch. What was left out of some is the average
            already.
    """
    every = [state["epoch"]["gradients"] for state in states if state["epoch"] is not None]
    own = [each for each in every if not any(isinstance(v, str) for v in each.values())]
    return {
        index: sum(found[index] for found in own if index in found) / len(own)
        for index in dict.fromkeys(chain(*own))
    }


def mean_window(states: Sequence[Any]) -> WindowState:
    """The window whose gradients are ``mean_gradients``: any number of processes may go on.

    Args:
        states: Of all processes, within an epoch.
    """
    windows = [state.get("window", Window().state()) for state in states]
    weights = [each["weight"] for each in windows if each["weight"] is not None]
    mean = sum(weights) / len(windows) if weights else None
    return {"weight": mean, "reference": windows[0]["reference"]}
