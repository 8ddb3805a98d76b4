"""Module hooks that make a sharded module behave like one in DDP."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed
from torch.nn import Module, Parameter
from torch.utils._pytree import tree_map

from brain_lightning.errors import UnsupportedError

from .tensors import is_shard


def clone_views(module: Module) -> None:
    """Registers a hook that clones the views that a module returns.

    Args:
        module: Module that is not sharded yet, because the hook has to run before FSDP2's.
    """
    module.register_forward_hook(lambda _, __, output: without_views(output))


def without_views(output: Any) -> Any:
    """Returns the output of a sharded module with clones in place of views.

    FSDP2 gathers weights for the backward pass by a hook on the tensors that a module
    returns. If the recipe changes a view in place, such as ``output[:, 0] = 0`` after
    ``x.transpose(1, 2)``, the hook is lost, and all gradients with it, without an error. The
    hook also misses tensors in objects that are not registered as pytrees.

    Args:
        output: Return value of ``forward`` or of another method.

    Raises:
        UnsupportedError: The output contains such an object with a tensor that needs
            gradients.
    """
    if not torch.is_grad_enabled():
        return output
    return tree_map(_without_view, output)


def _without_view(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone() if value._is_view() and value.requires_grad else value
    held = getattr(value, "__dict__", {}).items()
    for name, each in held:
        if isinstance(each, Tensor) and each.requires_grad:
            raise UnsupportedError(
                f"a sharded module returns a {type(value).__name__} that holds a tensor in "
                f".{name}. FSDP2 does not find this tensor, so the weights would get no "
                "gradients. Return tensors, or tuples, lists or dicts of tensors."
            )
    return value


# Gathered weights of each module. FSDP2 uses the same parameter objects at each gathering.
_gathered: WeakKeyDictionary[Module, list[Parameter]] = WeakKeyDictionary()


def remember_gathered(module: Module) -> None:
    """Records the gathered weights of a module, from which FSDP2 takes the gradients.

    Args:
        module: Module that is being called, so its weights are gathered.
    """
    _gathered[module] = [p for p in module.parameters() if not is_shard(p)]


def gathered_of(module: Module) -> list[Parameter]:
    """Returns the recorded gathered weights. A gradient that they still hold was not averaged.

    Args:
        module: Any module.
    """
    return _gathered.get(module, [])


def keep_buffers_equal(module: Module) -> None:
    """Broadcasts the buffers of a module from rank 0 whenever DDP would do so.

    ``DistributedDataParallel(broadcast_buffers=True)`` broadcasts them in the forward pass
    that follows a forward pass whose gradients are averaged. It tracks this in two attributes,
    which the module gets as well. ``no_sync`` of a Brain, brain_lightning's or SpeechBrain's,
    changes the first attribute.

    Args:
        module: Module with parameters that are trained.
    """
    trained: Any = module
    trained.require_backward_grad_sync = trained.require_forward_param_sync = True
    module.register_forward_pre_hook(_before_forward)


def _before_forward(module: Any, _: Any) -> None:
    if module.training:
        synchronize_buffers(module)
        is_averaged = torch.is_grad_enabled() and module.require_backward_grad_sync
        module.require_forward_param_sync = is_averaged


def synchronize_buffers(module: Module) -> None:
    """Broadcasts the buffers of a module from rank 0 if they may differ between ranks.

    Args:
        module: Any module.
    """
    if getattr(module, "require_forward_param_sync", False):
        vars(module)["require_forward_param_sync"] = False
        broadcast(module.buffers())


# Bytes that are sent together. Tensors that are sent together are copied first.
TOGETHER = 32 * 2**20


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Broadcasts tensors from rank 0 in place. Small tensors of one dtype are sent together.

    Args:
        tensors: Tensors that have the same shapes, types and order on all ranks.
    """
    by_type: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_type[tensor.dtype].append(tensor.detach())
    for same in by_type.values():
        for batch in _batches(same):
            flats = [tensor.reshape(-1) for tensor in batch]
            # A large tensor is sent by itself, without a copy.
            flat = torch.cat(flats) if len(flats) > 1 else flats[0]
            distributed.broadcast(flat, src=0)
            parts = torch.split(flat, [tensor.numel() for tensor in batch])
            for tensor, part in zip(batch, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))


def _batches(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    batch, size = list[Tensor](), 0
    for tensor in tensors:
        if batch and size + tensor.nbytes > TOGETHER:
            yield batch
            batch, size = [], 0
        batch.append(tensor)
        size += tensor.nbytes
    yield batch
