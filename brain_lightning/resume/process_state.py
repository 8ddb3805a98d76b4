"""State of the modules that may differ between ranks, and how it is saved."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from brain_lightning.distributed.communication import if_main_process, world_size
from brain_lightning.fsdp2.tensors import is_shard, on_main
from brain_lightning.protocol import BrainProtocol
from brain_lightning.step.window import Window, WindowState

# Placeholder for a value that only the state of rank 0 contains. Part of the file format.
ON_MAIN = "brain_lightning: in the state of the first process"


def buffers(brain: BrainProtocol) -> dict[int, Tensor]:
    """Returns the buffers of this rank that the saved modules may not have.

    Args:
        brain: The Brain.

    Returns:
        Copies on the CPU, by index. On several ranks all buffers, because they may differ
        between ranks. On one rank the buffers that are not persistent.
    """
    every = enumerate(brain.modules.buffers())
    kept = unsaved_buffers(brain) if world_size() == 1 else None
    return {
        index: buffer.detach().to("cpu", copy=True)
        for index, buffer in every
        if kept is None or index in kept
    }


def unsaved_buffers(brain: BrainProtocol) -> set[int]:
    """Returns the indices of the buffers that are not persistent: no state dict has them.

    Args:
        brain: The Brain.
    """
    unsaved = {
        f"{prefix}.{name}"
        for prefix, module in brain.modules.named_modules()
        for name in module._non_persistent_buffers_set
    }
    names = enumerate(name for name, _ in brain.modules.named_buffers())
    return {index for index, name in names if name in unsaved}


def restore_buffers(brain: BrainProtocol, saved: Mapping[int, Tensor]) -> None:
    """Restores buffers.

    Args:
        brain: The Brain.
        saved: Buffers by index, as in ``buffers``. Some may be missing.
    """
    for index, buffer in enumerate(brain.modules.buffers()):
        if index in saved and saved[index].shape == buffer.shape:
            buffer.copy_(saved[index])


def differing(
    tensors: Mapping[int, Tensor], others: Mapping[int, Tensor], always: Collection[int]
) -> dict[int, Tensor]:
    """Returns the tensors that differ from the tensors of another rank.

    Args:
        tensors: Tensors of one rank, by index.
        others: Tensors of the other rank, by the same indices.
        always: Indices of tensors that are returned in any case.
    """
    return {
        index: tensor
        for index, tensor in tensors.items()
        if index in always or not torch.equal(tensor, others[index])
    }


def synchronizes(brain: BrainProtocol) -> list[bool]:
    """Whether the next forward pass of each DDP module broadcasts the buffers of rank 0.

    It does so after a backward pass that has averaged gradients. It does not while gradients
    accumulate, and not after an evaluation.

    Args:
        brain: The Brain.

    Returns:
        One value for each wrapped module, in their order.
    """
    return [module.require_forward_param_sync for module in _wrapped(brain)]


def restore_synchronizes(brain: BrainProtocol, saved: list[bool]) -> None:
    """Restores the values of ``synchronizes``.

    Args:
        brain: The Brain.
        saved: Result of ``synchronizes``.
    """
    for module, value in zip(_wrapped(brain), saved, strict=False):
        module.require_forward_param_sync = value


def _wrapped(brain: BrainProtocol) -> list[Any]:
    """Returns the modules that are wrapped in DDP, or sharded and trained."""
    if world_size() == 1:
        return []
    modules = brain.modules.values()
    return [module for module in modules if hasattr(module, "require_forward_param_sync")]


def full_on_main(state: Any) -> Any:
    """Gathers the shards in a state on rank 0. The call is collective.

    Args:
        state: Nested dicts and lists with any values.

    Returns:
        On rank 0, the state with full tensors. On the other ranks, the state with
        placeholders instead of shards.
    """
    if is_shard(state):
        full = on_main(state)
        return full if if_main_process() else ON_MAIN
    if isinstance(state, dict):
        return {key: full_on_main(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(full_on_main, state))
    return state


def with_full(state: Any, first: Any) -> Any:
    """Replaces the placeholders in the state of a rank by the values of rank 0.

    Args:
        state: Result of ``full_on_main``, after it was saved and loaded.
        first: State of rank 0.
    """
    if isinstance(state, str) and state == ON_MAIN:
        return first
    if isinstance(state, dict) and isinstance(first, dict):
        return {key: with_full(value, first.get(key)) for key, value in state.items()}
    return state


def mean_gradients(states: Sequence[Any]) -> dict[int, Tensor]:
    """Averages the gradients of an accumulation window over ranks.

    Args:
        states: States of all ranks, saved within an epoch. If some states have placeholders,
            the other states already contain the average.
    """
    every = [state["epoch"]["gradients"] for state in states if state["epoch"] is not None]
    own = [each for each in every if not any(isinstance(v, str) for v in each.values())]
    return {
        index: sum(found[index] for found in own if index in found) / len(own)
        for index in dict.fromkeys(chain(*own))
    }


def mean_window(states: Sequence[Any]) -> WindowState:
    """Returns the accumulation window that belongs to ``mean_gradients``.

    With both, a run can resume with any number of ranks.

    Args:
        states: States of all ranks, saved within an epoch.
    """
    windows = [state.get("window", Window().state()) for state in states]
    weights = [each["weight"] for each in windows if each["weight"] is not None]
    mean = sum(weights) / len(windows) if weights else None
    return {"weight": mean, "reference": windows[0]["reference"]}
