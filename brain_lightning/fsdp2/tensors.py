"""Conversions between shards (``torch.distributed.tensor.DTensor``) and full tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from brain_lightning.compat.versions import DTensor
from brain_lightning.distributed.communication import (
    communicates,
    if_main_process,
    on_all_ranks,
    world_size,
)
from brain_lightning.errors import UnsupportedError


def is_shard(value: object) -> bool:
    """Returns whether an object is a sharded tensor.

    Args:
        value: Any object.
    """
    return isinstance(value, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Returns the full tensor, on all ranks.

    Args:
        tensor: A shard or a full tensor. If it is a shard, all ranks have to call this.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    # With cpu_offload the shard is in CPU memory, but the collective runs on the device.
    shard: Any = tensor.to(tensor.device_mesh.device_type)
    return shard.full_tensor()  # type: ignore[no-any-return]


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that this rank holds.

    Args:
        tensor: A shard, or a full tensor, which is returned unchanged.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_finite(tensor: Tensor) -> bool:
    """Returns whether all elements of the full tensor are finite, on all ranks the same.

    Args:
        tensor: A shard or a full tensor. If it is a shard, all ranks have to call this.
    """
    finite = bool(torch.isfinite(local(tensor)).all())
    if not isinstance(tensor, DTensor):
        return finite
    # In torch 2.8, DTensor.all() is True if one shard is finite.
    return on_all_ranks(finite, tensor.device_mesh.device_type)


def on_main(value: Any) -> Any:
    """Returns the full tensor of a shard on the CPU on rank 0, and the shard on other ranks.

    Args:
        value: Any object. If it is a shard, all ranks have to call this. Other objects are
            returned unchanged.

    Raises:
        UnsupportedError: Only rank 0 calls it, in ``run_on_main``.
    """
    if not isinstance(value, DTensor):
        return value
    if world_size() > 1 and not communicates():
        raise UnsupportedError(
            "a sharded module, or its optimizer, is saved on rank 0 only, in run_on_main. "
            "Call state_dict() on all ranks, and pass the result to run_on_main."
        )
    with torch.no_grad():
        gathered = whole(value)
    return _in_own_storage(gathered.cpu()) if if_main_process() else value


def _in_own_storage(tensor: Tensor) -> Tensor:
    """Returns a tensor with a separate storage, because files contain whole storages."""
    is_alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if is_alone else tensor.clone()


def like(value: Any, tensor: Tensor) -> Any:
    """Shards a full tensor in the same way as another tensor, without communication.

    Args:
        value: Any object. Objects that are not full tensors of this shape are returned
            unchanged.
        tensor: The other tensor. If it is not a shard, ``value`` is returned unchanged.
    """
    if not isinstance(tensor, DTensor) or not isinstance(value, Tensor) or is_shard(value):
        return value
    if value.shape != tensor.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # Each rank has the full tensor and takes its part.
    mesh, placements = tensor.device_mesh, tensor.placements
    return distribute_tensor(value.detach(), mesh, placements, src_data_rank=None).to(
        tensor.device
    )
