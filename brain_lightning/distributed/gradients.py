"""Does the communication of DistributedDataParallel later, with bitwise identical results."""

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
    """Returns the entries of a Brain's modules that are wrapped.

    Args:
        brain: Brain in training.
    """
    return [m for m in brain.modules.values() if isinstance(m, DistributedDataParallel)]


def modules_with_gradients(brain: BrainProtocol) -> list[DistributedDataParallel]:
    """Returns the wrapped entries that have gradients, because they had a backward pass.

    Args:
        brain: Brain in training.
    """
    modules = wrapped_modules(brain)
    return [m for m in modules if any(p.grad is not None for p in m.parameters())]


def averaged_parameters(brain: BrainProtocol) -> list[Parameter]:
    """Returns the parameters whose gradients are averaged, in the same order on all ranks.

    Args:
        brain: Brain in training.
    """
    parameters = (p for module in wrapped_modules(brain) for p in module.parameters())
    return list(dict.fromkeys(p for p in parameters if p.requires_grad))


@torch.no_grad()
def average_gradients(parameters: Iterable[Parameter]) -> None:
    """Averages gradients, with one collective per dtype and device.

    As in the reducer of DistributedDataParallel, each rank divides its gradients first, and
    then the gradients are summed.

    Args:
        parameters: Parameters that have a gradient on any rank, the same on all ranks.
    """
    _in_one_piece(
        map(_gradient, parameters),
        lambda flat: torch.distributed.all_reduce(flat.mul_(1 / world_size())),
    )


def _gradient(parameter: Parameter) -> Tensor:
    """Returns the gradient of a parameter. If only other ranks used it, creates zeros."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


@torch.no_grad()
def share_buffers(brain: BrainProtocol) -> None:
    """Broadcasts buffers from rank 0, if DDP's next forward pass would broadcast them.

    If a rank ran out of memory in the forward pass, the other ranks would hang there.

    Args:
        brain: Brain before a training batch.
    """
    buffers: list[Tensor] = []
    for module in wrapped_modules(brain):
        if module.require_forward_param_sync and module.broadcast_buffers:
            buffers += module.module.buffers()
            module.require_forward_param_sync = False
    _in_one_piece(buffers, lambda flat: torch.distributed.broadcast(flat, 0))


def _in_one_piece(tensors: Iterable[Tensor], communicate: Callable[[Tensor], object]) -> None:
    """Communicates tensors in place, in one piece per dtype and device."""
    groups = defaultdict(list)
    for tensor in tensors:
        groups[tensor.dtype, tensor.device].append(tensor)
    for group in groups.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        communicate(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in group])
        for tensor, part in zip(group, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
