"""What each of several processes has of its own in the modules, and saves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from brain_lightning.distributed.communication import world_size
from brain_lightning.protocol import BrainProtocol


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


def _wrapped(brain: BrainProtocol) -> list[DistributedDataParallel]:
    if world_size() == 1:
        return []
    modules = brain.modules.values()
    return [module for module in modules if isinstance(module, DistributedDataParallel)]
