"""What a sharded module does differently from one in DDP, mended by hooks of the module."""

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
    """Makes a module return no views, before it is sharded.

    Args:
        module: Not sharded yet: the hook has to run before that of FSDP2.
    """
    module.register_forward_hook(lambda _, __, output: without_views(output))


def without_views(output: Any) -> Any:
    """What a sharded module returns, with clones of views.

    FSDP2 gathers weights for the backward pass by a hook on the tensors that a module
    returns. A change in place of a view, as ``output[:, 0] = 0`` of ``x.transpose(1, 2)``,
    would lose it, and with it all gradients, without a word; and so would a tensor that is
    in an object which is not taken apart.

    Args:
        output: What ``forward``, or another method, returns.

    Raises:
        UnsupportedError: There is such an object.
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
                f"a sharded module returns a {type(value).__name__} that holds a tensor as "
                f".{name}, and would train nothing: return tensors, in tuples, lists or dicts"
            )
    return value


# The weights of a module while they are whole: each time they are the same parameters.
_gathered: WeakKeyDictionary[Module, list[Parameter]] = WeakKeyDictionary()


def remember_gathered(module: Module) -> None:
    """Remembers the whole weights of a module, which FSDP2 takes the gradients from.

    Args:
        module: It is called: its weights are gathered.
    """
    _gathered[module] = [p for p in module.parameters() if not is_shard(p)]


def gathered_of(module: Module) -> list[Parameter]:
    """What was remembered; a gradient that it still has was not averaged.

    Args:
        module: Any module.
    """
    return _gathered.get(module, [])


def keep_buffers_equal(module: Module) -> None:
    """Has the buffers of a module made those of the first process, when DDP does so.

    It does in the forward pass after one whose gradients were to be averaged
    (``DistributedDataParallel(broadcast_buffers=True)``), which two attributes say: the module
    gets them as well. ``no_sync`` of a Brain, ours or SpeechBrain's, changes the first.

    Args:
        module: A module that is trained.
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
    """Makes the buffers of a module those of the first process, if they may differ.

    Args:
        module: Any module.
    """
    if getattr(module, "require_forward_param_sync", False):
        vars(module)["require_forward_param_sync"] = False
        broadcast(module.buffers())


# Bytes that are sent together: they are copied for it.
TOGETHER = 32 * 2**20


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Makes tensors those of the first process; small ones of a type are sent together.

    Args:
        tensors: The same in all processes, but for their values.
    """
    by_type: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_type[tensor.dtype].append(tensor.detach())
    for same in by_type.values():
        for batch in _batches(same):
            flats = [tensor.reshape(-1) for tensor in batch]
            # A large one by itself, without a copy.
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
