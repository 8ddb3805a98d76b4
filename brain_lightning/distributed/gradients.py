"""What DistributedDataParallel communicates of a batch, at another moment: the same bits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from brain_lightning.protocol import BrainProtocol

from .communication import world_size


def wrapped_modules(brain: BrainProtocol) -> list[DistributedDataParallel]:
    """The entries of a Brain's modules that are wrapped.

    Args:
        brain: The Brain in training.
    """
    return [m for m in brain.modules.values() if isinstance(m, DistributedDataParallel)]


def modules_with_gradients(brain: BrainProtocol) -> list[DistributedDataParallel]:
    """Those that have had a backward pass: others were not called, or without gradients.

    Args:
        brain: The Brain in training.
    """
    modules = wrapped_modules(brain)
    return [m for m in modules if any(p.grad is not None for p in m.parameters())]


def averaged_parameters(brain: BrainProtocol) -> list[Parameter]:
    """The parameters whose gradients are averaged, in the same order in all processes.

    Args:
        brain: The Brain in training.
    """
    parameters = (p for module in wrapped_modules(brain) for p in module.parameters())
    return list(dict.fromkeys(p for p in parameters if p.requires_grad))


@torch.no_grad()
def average_gradients(parameters: Iterable[Parameter]) -> None:
    """Averages gradients, with one collective for each dtype and device.

    As a reducer of DistributedDataParallel does: each process divides, and then they add.

    Args:
        parameters: Those that have a gradient in some process: the same in all of them.
    """
    _in_one_piece(
        map(_gradient, parameters),
        lambda flat: torch.distributed.all_reduce(flat.mul_(1 / world_size())),
    )


def _gradient(parameter: Parameter) -> Tensor:
    """Of a parameter, which another process has used and this one has not: then zeros."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


@torch.no_grad()
def share_buffers(brain: BrainProtocol) -> None:
    """Makes buffers those of the first process, where the next forward pass would do so.

    In the forward pass a process that has no memory would leave the others waiting.

    Args:
        brain: The Brain before a training batch.
    """
    buffers: list[Tensor] = []
    for module in wrapped_modules(brain):
        if module.require_forward_param_sync and module.broadcast_buffers:
            buffers += module.module.buffers()
            module.require_forward_param_sync = False
    _in_one_piece(buffers, lambda flat: torch.distributed.broadcast(flat, 0))


def _in_one_piece(tensors: Iterable[Tensor], communicate: Callable[[Tensor], object]) -> None:
    """Communicates tensors in place, those of one dtype and device together."""
    groups = defaultdict(list)
    for tensor in tensors:
        groups[tensor.dtype, tensor.device].append(tensor)
    for group in groups.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        communicate(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in group])
        for tensor, part in zip(group, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
