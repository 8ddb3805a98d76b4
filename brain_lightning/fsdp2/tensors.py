"""Shards of tensors: ``torch.distributed.tensor.DTensor``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from brain_lightning.compat.versions import DTensor
from brain_lightning.distributed.communication import communicates, if_main_process, world_size
from brain_lightning.errors import UnsupportedError


def is_shard(value: object) -> bool:
    """Whether something is a tensor of which each process has a part.

    Args:
        value: Anything.
    """
    return isinstance(value, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, in all processes.

    Args:
        tensor: Where it is a shard, all processes call this.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has.

    Args:
        tensor: One that is no shard is its own part.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether all of a tensor is finite, the same answer in all processes.

    Args:
        tensor: Where it is a shard, all processes call this.
    """
    return bool(whole(torch.isfinite(tensor).all()))


def on_main(value: Any) -> Any:
    """The whole of a shard, on the CPU, in the main process; others keep what they have.

    Args:
        value: Anything; where it is a shard, all processes call this.

    Raises:
        UnsupportedError: The others do not.
    """
    if not isinstance(value, DTensor):
        return value
    if world_size() > 1 and not communicates():
        raise UnsupportedError(
            "a sharded module, or its optimizer, is saved by the main process alone, in "
            "run_on_main: call state_dict() in all processes, and write what it returns there"
        )
    with torch.no_grad():
        gathered = value.full_tensor()
    return _alone(gathered.cpu()) if if_main_process() else value


def _alone(tensor: Tensor) -> Tensor:
    """A tensor that is alone in its memory, all of which is written to a file."""
    is_alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if is_alone else tensor.clone()


def like(value: Any, tensor: Tensor) -> Any:
    """A whole tensor as a shard, without communication.

    Args:
        value: Anything; another than a whole tensor of the same shape is left as it is.
        tensor: What may be a shard.
    """
    if not isinstance(tensor, DTensor) or not isinstance(value, Tensor) or is_shard(value):
        return value
    if value.shape != tensor.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # Each process has all of it: it takes its part.
    value = value.detach().to(tensor.device)
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
