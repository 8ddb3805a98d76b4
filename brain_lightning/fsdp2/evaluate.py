"""Weights that are whole while a stage evaluates, in which processes do different things."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn import Module

from brain_lightning.compat.versions import FSDPModule
from brain_lightning.errors import UnsupportedError
from brain_lightning.protocol import BrainProtocol

from .hooks import synchronize_buffers
from .sharding import Sharding
from .tensors import is_shard


def is_sharded(module: Module | None) -> bool:
    """Whether a module, or something in it, is in shards.

    Args:
        module: An entry of ``brain.modules``.
    """
    return module is not None and any(isinstance(m, FSDPModule) for m in module.modules())


def _sharded(brain: BrainProtocol) -> list[Any]:
    return [module for module in brain.modules.modules() if isinstance(module, FSDPModule)]


def check_evaluation(brain: BrainProtocol, sharding: Sharding) -> None:
    """Refuses stages in which processes would wait for each other for ever.

    Args:
        brain: The Brain.
        sharding: How its modules are sharded.

    Raises:
        UnsupportedError: Each process gets other batches to evaluate.
    """
    if brain._lightning.shard_eval and not sharding.gather_to_evaluate:
        raise UnsupportedError(
            "shard_eval gives processes different numbers of batches, and with "
            "FSDP2Strategy(gather_to_evaluate=False) each batch needs all processes: leave "
            "one of them out"
        )


@contextmanager
def gathered(brain: BrainProtocol) -> Iterator[None]:
    """A context in which all weights are whole in each process, without communication.

    With ``gather_to_evaluate=False`` they are as in TRAIN: each call gathers them. All
    processes enter it together. What saves in it releases the weights, and they are
    gathered again where they are used, by all processes together.

    Args:
        brain: Where nothing of it is sharded, or its strategy has
            ``gather_to_evaluate=False``, no weights are gathered.

    Yields:
        None
    """
    sharding: Sharding | None = brain._lightning.sharding
    modules = _sharded(brain) if sharding is None or sharding.gather_to_evaluate else []
    for module in _sharded(brain):
        synchronize_buffers(module)
    try:
        for module in modules:
            module.unshard()
            _reshard_after_use(module, False)
        yield
    finally:
        for module in modules:
            _reshard_after_use(module, True)
        release(brain)


def _reshard_after_use(module: Any, use: bool) -> None:
    module.set_reshard_after_forward(use, recurse=False)
    # An attack on the input has a backward pass, too.
    module.set_reshard_after_backward(use, recurse=False)


def release(brain: BrainProtocol) -> None:
    """Releases weights that are whole: the parameters are those that optimizers have.

    Args:
        brain: The Brain.

    Raises:
        UnsupportedError: ``numpy()`` was called on one, on the CPU: an array has its memory.
    """
    for module in _sharded(brain):
        for name, parameter in module.named_parameters():
            if not (is_shard(parameter) or parameter.untyped_storage().resizable()):
                raise UnsupportedError(
                    f"numpy() was called on weights, {name}, whose memory is released when "
                    "they are in shards again: copy them first, .clone().numpy()"
                )
        module.reshard()
