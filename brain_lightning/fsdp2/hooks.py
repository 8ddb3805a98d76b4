"""What a sharded module does differently from one in DDP, mended by hooks of the module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import Module
from torch.utils._pytree import tree_map_only


def clone_views(module: Module) -> None:
    """Makes a module return no views, before it is sharded.

    FSDP2 gathers weights for the backward pass by a hook on what a module returns. A change
    in place of a view, as ``output[:, 0] = 0`` of ``x.transpose(1, 2)``, would lose it, and
    with it all gradients, without a word.

    Args:
        module: Not sharded yet: the hook has to run before that of FSDP2.
    """

    def clone(_: Module, __: Any, output: Any) -> Any:
        return tree_map_only(Tensor, _cloned, output) if torch.is_grad_enabled() else output

    module.register_forward_hook(clone)


def _cloned(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor._is_view() and tensor.requires_grad else tensor


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


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Makes tensors those of the first process, by one collective for each type.

    Args:
        tensors: The same in all processes, but for their values.
    """
    by_type: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_type[tensor.dtype].append(tensor.detach())
    for same in by_type.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        distributed.broadcast(flat, src=0)
        parts = torch.split(flat, [tensor.numel() for tensor in same])
        for tensor, part in zip(same, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))
