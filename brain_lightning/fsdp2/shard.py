"""Puts each entry of a Brain's modules in shards, where DDP would wrap it."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module

from brain_lightning.distributed.communication import world_size
from brain_lightning.distributed.ddp import with_batchnorm_for
from brain_lightning.errors import UnsupportedError
from brain_lightning.protocol import BrainProtocol

from .blocks import blocks, units
from .evaluate import check_evaluation, is_sharded, keep_changes
from .hooks import broadcast, clone_views, keep_buffers_equal, remember_gathered
from .meta import is_meta, materialize
from .methods import METHODS, register_methods
from .sharding import Sharding
from .state_dict import save_whole_module
from .unsupported import check_modules, check_offload, may_leave_out, refuse_comm_hooks

# Of the processes: copies of the model, and its shards.
AXES = ("replicate", "shard")


def shard_modules(brain: BrainProtocol, sharding: Sharding) -> None:
    """Shards each entry (``torch.distributed.fsdp.fully_shard``).

    One is moved to the device, or gets its memory there, after the one before it is sharded:
    no more than one is ever whole there. One that is sharded already stays as it is.

    Args:
        brain: The Brain, in a process group; compiled already, and without optimizers.
        sharding: How.

    Raises:
        UnsupportedError: It cannot be sharded.
    """
    check_modules(brain, sharding)
    check_evaluation(brain, sharding)
    device, options = torch.device(brain.device), dict[str, Any]()
    for name, module in brain.modules.items():
        if module is None or is_sharded(module):
            continue
        if is_meta(module):
            materialize(name, module, device)
        brain.modules[name] = module = module.to(device)
        if any(p.requires_grad for p in module.parameters()):
            brain.modules[name] = module = with_batchnorm_for(device.type, name, module)
        for unit in units(module):
            # Not before: they make process groups, and most calls find nothing to shard.
            options = options or _options(brain, sharding)
            _shard(unit, sharding, options)
            if may_leave_out(brain, unit):
                # Else gradients of different parameters would be averaged, without a word.
                unit.set_reduce_scatter_unused_params(True)  # type: ignore[operator]


def check_sharded(brain: BrainProtocol) -> None:
    """Refuses to train an entry that is not sharded: it is not on the device either.

    Args:
        brain: The Brain, about to make its optimizers.

    Raises:
        UnsupportedError: There is one: the recipe wraps its modules itself, or not at all.
    """
    if brain._lightning.sharding is None:
        return
    for name, module in brain.modules.items():
        trained = module is not None and any(p.requires_grad for p in module.parameters())
        if trained and not is_sharded(module):
            raise UnsupportedError(
                f"modules[{name!r}] is not sharded when optimizers are made: on_fit_start "
                "has to call self._wrap_distributed(), and one of the recipe's own "
                "super()._wrap_distributed(). Or use strategy='ddp'"
            )


def _options(brain: BrainProtocol, sharding: Sharding) -> dict[str, Any]:
    """Arguments of ``fully_shard``."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy

    kind, copies = torch.device(brain.device).type, sharding.replicate
    mesh = init_device_mesh(kind, (copies, world_size() // copies), mesh_dim_names=AXES)
    # Else weights are no shards between a forward pass without gradients and the next one.
    options: dict[str, Any] = {"reshard_after_forward": True}
    if sharding.cpu_offload and kind != "cpu":
        check_offload()
        options["offload_policy"] = CPUOffloadPolicy()
    return {"mesh": mesh if copies > 1 else mesh[AXES[1]], **options}


def _shard(unit: Module, sharding: Sharding, options: dict[str, Any]) -> None:
    from torch.distributed.fsdp import fully_shard

    # Processes may have initialized it differently.
    broadcast([*unit.parameters(), *unit.buffers()])
    if any(p.requires_grad for p in unit.parameters()):
        keep_buffers_equal(unit)
    keep_changes(unit)
    inner = blocks(unit, sharding.blocks)
    for module in (*inner, unit):
        clone_views(module)
        sharded: Any = fully_shard(module, **options)
        if options["mesh"].device_type == "cpu":
            # Gloo would add gradients up where it is asked for their average (torch 2.8).
            sharded.set_force_sum_reduction_for_comms(True)
    _initialize(unit)
    for module in (*inner, unit):
        register_methods(module, (*METHODS, *sharding.methods))
    save_whole_module(unit)
    # SpeechBrain's recipes look for what DDP wraps; here nothing does.
    if not hasattr(unit, "module"):
        vars(unit)["module"] = unit
    refuse_comm_hooks(unit)


def _initialize(unit: Module) -> None:
    """Lets FSDP2 set itself up with the unit as root, before a block of it is called."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    vars(unit)["set_up"] = lambda: remember_gathered(unit)
    register_fsdp_forward_method(unit, "set_up")
    with torch.no_grad():
        unit.set_up()  # type: ignore[operator]
    del vars(unit)["set_up"]
