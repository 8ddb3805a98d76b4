"""What a sharded module does differently from one in DDP, mended by hooks of the module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed
from torch.nn import Module
from torch.utils._pytree import tree_map

from brain_lightning.errors import UnsupportedError

# Of modules whose buffers are to become those of the first process.
_buffers: WeakKeyDictionary[Module, _BufferSynchronization] = WeakKeyDictionary()


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


class _BufferSynchronization:
    """Makes the buffers those of the first process, when DDP does so.

    It does in the forward pass after one that may have a backward pass
    (``DistributedDataParallel(broadcast_buffers=True)``).

    Args:
        module: The module.
    """

    def __init__(self, module: Module) -> None:
        self._is_due = True
        module.register_forward_pre_hook(self._before_forward)

    def _before_forward(self, module: Module, _: Any) -> None:
        if module.training:
            self.synchronize(module)
            self._is_due = torch.is_grad_enabled()

    def synchronize(self, module: Module) -> None:
        """Makes them those of the first process, if they may differ.

        Args:
            module: The module.
        """
        if self._is_due:
            self._is_due = False
            broadcast(module.buffers())


def keep_buffers_equal(module: Module) -> None:
    """Has the buffers of a module made those of the first process, as DDP does.

    Args:
        module: A module that is trained.
    """
    if any(True for _ in module.buffers()):
        _buffers[module] = _BufferSynchronization(module)


def synchronize_buffers(module: Module) -> None:
    """Makes the buffers of a module those of the first process, if they may differ.

    Args:
        module: Any module.
    """
    if module in _buffers:
        _buffers[module].synchronize(module)


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
