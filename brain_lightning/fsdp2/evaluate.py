"""Gathers all weights for evaluation, so that ranks may evaluate different batches."""

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
    """Returns whether a module or a part of it is sharded.

    Args:
        module: An entry of ``brain.modules``.
    """
    return module is not None and any(isinstance(m, FSDPModule) for m in module.modules())


def _sharded(brain: BrainProtocol) -> list[Any]:
    return [module for module in brain.modules.modules() if isinstance(module, FSDPModule)]


def check_evaluation(brain: BrainProtocol, sharding: Sharding) -> None:
    """Checks that ranks evaluate the same number of batches if weights are not gathered first.

    Args:
        brain: The Brain.
        sharding: How its modules are sharded.

    Raises:
        UnsupportedError: ``shard_eval`` is set and ``gather_to_evaluate`` is not, so the ranks
            would hang.
    """
    if brain._lightning.shard_eval and not sharding.gather_to_evaluate:
        raise UnsupportedError(
            "shard_eval gives ranks different numbers of batches, and with "
            "FSDP2Strategy(gather_to_evaluate=False) all ranks must evaluate the same number "
            "of batches. Remove one of the two options."
        )


@contextmanager
def gathered(brain: BrainProtocol) -> Iterator[None]:
    """Context manager in which each rank holds all weights, so that calls need no collectives.

    All ranks enter and leave it together. With ``gather_to_evaluate=False`` nothing is
    gathered here: each call gathers the weights that it uses, as in TRAIN. Saving a checkpoint
    within the context releases the weights. They are gathered again at their next use, by all
    ranks together.

    Args:
        brain: The Brain. If none of its modules is sharded, nothing happens.

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
        changes.apply()
        release(brain)


def _reshard_after_use(module: Any, use: bool) -> None:
    module.set_reshard_after_forward(use, recurse=False)
    # An adversarial attack on the input runs a backward pass in evaluation too.
    module.set_reshard_after_backward(use, recurse=False)


def release(brain: BrainProtocol) -> None:
    """Releases gathered weights, so that the parameters are the shards that optimizers hold.

    Args:
        brain: The Brain.

    Raises:
        UnsupportedError: ``numpy()`` was called on a gathered weight on the CPU. The array
            shares the memory of the weight, which cannot be released.
    """
    for changes in _watching:
        changes.apply()
    for module in _sharded(brain):
        for name, parameter in module.named_parameters():
            if not (is_shard(parameter) or parameter.untyped_storage().resizable()):
                raise UnsupportedError(
                    f"numpy() was called on the gathered weight {name!r}, and the array "
                    "shares its memory, which has to be released. Use .clone().numpy()."
                )
        module.reshard()


class _Changes:
    """Applies changes that a recipe makes to gathered weights to the shards as well.

    ``on_stage_end`` may unfreeze weights, initialize them again or pass them to an optimizer.

    Args:
        brain: The Brain, its weights sharded and not gathered yet.
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
        self.is_applied = False

    def begin(self) -> None:
        """Records the versions of the weights, which are gathered now."""
        self._versions = {whole: whole._version for whole, _ in self._whole()}
        _watching.append(self)

    def end(self) -> None:
        """Stops tracking changes."""
        if self in _watching:
            _watching.remove(self)

    def apply(self) -> None:
        """Copies changes of weights that are still gathered to their shards."""
        shards = dict(self._whole())
        with torch.no_grad():
            for whole, shard in shards.items():
                shard.requires_grad_(whole.requires_grad)
                if whole._version != self._versions.get(whole, whole._version):
                    local(shard).copy_(local(like(whole, shard)))
        for _, optimizer in optimizers_of(self._brain) if shards else ():
            _give_shards(optimizer, shards)

    def _whole(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields each weight that is gathered, with its shard."""
        for part, name, shard in self._shards:
            whole = getattr(part, name, shard)
            if not is_shard(whole):
                yield whole, shard


# One element per running evaluation, because evaluations may be nested.
_watching: list[_Changes] = []


def _give_shards(optimizer: Optimizer, shards: dict[Tensor, Tensor]) -> None:
    for group in optimizer.param_groups:
        # In place, because LBFGS holds a reference to the list.
        group["params"][:] = [shards.get(p, p) for p in group["params"]]
    for whole in shards.keys() & optimizer.state.keys():
        shard = shards[whole]
        state = optimizer.state.pop(whole)
        optimizer.state[shard] = {name: like(value, shard) for name, value in state.items()}


def apply_changes_before_states(module: Module) -> None:
    """Registers hooks that apply changes of gathered weights before ``state_dict`` is called.

    FSDP2 releases gathered weights in ``state_dict`` and ``load_state_dict``.

    Args:
        module: Module that is not sharded yet, because the hooks have to run before FSDP2's.
    """
    for part in module.modules():
        part.register_state_dict_pre_hook(_apply_once)  # type: ignore[no-untyped-call]
        part.register_load_state_dict_pre_hook(_apply_once)  # type: ignore[no-untyped-call]


def _apply_once(*_: object) -> None:
    for changes in _watching:
        if not changes.is_applied:
            changes.is_applied = True
            changes.apply()
