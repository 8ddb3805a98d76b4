"""Weights that are whole while a stage evaluates, in which processes do different things."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from brain_lightning.compat.versions import FSDPModule
from brain_lightning.errors import UnsupportedError
from brain_lightning.protocol import BrainProtocol, optimizers_of

from .hooks import synchronize_buffers
from .sharding import Sharding
from .tensors import is_shard, like, local


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
    changes = _Changes(brain)
    try:
        for module in modules:
            module.unshard()
            _reshard_after_use(module, False)
        changes.begin()
        yield
    finally:
        for module in modules:
            _reshard_after_use(module, True)
        changes.end()
        changes.keep()
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
    for changes in _watching:
        changes.keep()
    for module in _sharded(brain):
        for name, parameter in module.named_parameters():
            if not (is_shard(parameter) or parameter.untyped_storage().resizable()):
                raise UnsupportedError(
                    f"numpy() was called on weights, {name}, whose memory is released when "
                    "they are in shards again: copy them first, .clone().numpy()"
                )
        module.reshard()


class _Changes:
    """What a recipe changes while weights are whole, of which shards would know nothing.

    ``on_stage_end`` may unfreeze weights, initialize them again or give them to an optimizer.

    Args:
        brain: The Brain, its weights in shards.
    """

    def __init__(self, brain: BrainProtocol) -> None:
        self._brain = brain
        self._shards = [
            (part, name, parameter)
            for part in brain.modules.modules()
            for name, parameter in part.named_parameters(recurse=False)
            if is_shard(parameter)
        ]
        self._versions: dict[Tensor, int] = {}
        self.is_kept = False

    def begin(self) -> None:
        """Remembers weights, which are whole now."""
        self._versions = {whole: whole._version for whole, _ in self._whole()}
        _watching.append(self)

    def end(self) -> None:
        """Looks no more."""
        if self in _watching:
            _watching.remove(self)

    def keep(self) -> None:
        """Does to shards what was done to weights that are whole still."""
        shards = dict(self._whole())
        with torch.no_grad():
            for whole, shard in shards.items():
                shard.requires_grad_(whole.requires_grad)
                if whole._version != self._versions.get(whole, whole._version):
                    local(shard).copy_(local(like(whole, shard)))
        for _, optimizer in optimizers_of(self._brain) if shards else ():
            _give_shards(optimizer, shards)

    def _whole(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each weight that is whole, and its shard."""
        for part, name, shard in self._shards:
            whole = getattr(part, name, shard)
            if not is_shard(whole):
                yield whole, shard


# Of evaluations that run, one within another perhaps.
_watching: list[_Changes] = []


def _give_shards(optimizer: Optimizer, shards: dict[Tensor, Tensor]) -> None:
    for group in optimizer.param_groups:
        # In place: LBFGS keeps the list.
        group["params"][:] = [shards.get(p, p) for p in group["params"]]
    for whole in shards.keys() & optimizer.state.keys():
        shard = shards[whole]
        state = optimizer.state.pop(whole)
        optimizer.state[shard] = {name: like(value, shard) for name, value in state.items()}


def keep_changes(module: Module) -> None:
    """Has changes to whole weights kept before a state is made, for which FSDP2 releases them.

    Args:
        module: Not sharded yet: the hooks have to run before those of FSDP2.
    """
    for part in module.modules():
        part.register_state_dict_pre_hook(_keep_once)  # type: ignore[no-untyped-call]
        part.register_load_state_dict_pre_hook(_keep_once)  # type: ignore[no-untyped-call]


def _keep_once(*_: object) -> None:
    for changes in _watching:
        if not changes.is_kept:
            changes.is_kept = True
            changes.keep()
