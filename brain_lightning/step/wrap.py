"""Prepares each entry of a Brain's modules for several processes: DDP or sharding."""

from __future__ import annotations

from functools import partial

from brain_lightning.distributed import ddp
from brain_lightning.fsdp2.shard import shard_modules
from brain_lightning.fsdp2.sharding import Sharding
from brain_lightning.fsdp2.state_dict import save_full_optimizers
from brain_lightning.fsdp2.unsupported import check_first_steps, check_optimizers
from brain_lightning.protocol import BrainProtocol, optimizers_of, overrides


def wrap_modules(brain: BrainProtocol) -> None:
    """Wraps or shards each entry, depending on the strategy.

    Args:
        brain: Brain on its device, with compiled modules, in a process group.

    Raises:
        UnsupportedError: Several processes cannot train one of the modules.
    """
    sharding: Sharding | None = brain._lightning.sharding
    if sharding is None:
        ddp.wrap_modules(brain)
    else:
        shard_modules(brain, sharding)


def wraps_itself(brain: BrainProtocol) -> bool:
    """Returns whether a recipe wraps its modules for several processes itself.

    Args:
        brain: Brain before or during a run.
    """
    own = vars(brain).get("_wrap_distributed")
    ours = isinstance(own, partial) and own.func is wrap_modules
    return overrides(type(brain), "_wrap_distributed") or not (own is None or ours)


def save_full_states(brain: BrainProtocol) -> None:
    """Makes the optimizers of sharded modules save and load full tensors.

    Args:
        brain: Brain with its optimizers.

    Raises:
        UnsupportedError: An optimizer was created before the modules were sharded.
    """
    check_optimizers(brain)
    new = save_full_optimizers(optimizer for _, optimizer in optimizers_of(brain))
    if brain._lightning.sharding is not None:
        check_first_steps(brain, new)
