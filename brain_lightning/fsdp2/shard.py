"""Shards each entry of a Brain's modules, at the point where DDP would wrap it."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module

from brain_lightning.distributed.communication import world_size
from brain_lightning.distributed.ddp import with_batchnorm_for
from brain_lightning.errors import UnsupportedError
from brain_lightning.protocol import BrainProtocol

from .blocks import blocks, units
from .evaluate import apply_changes_before_states, check_evaluation, is_sharded
from .hooks import broadcast, clone_views, keep_buffers_equal, remember_gathered
from .meta import is_meta, materialize
from .methods import METHODS, register_methods
from .sharding import Sharding
from .state_dict import save_full_module
from .unsupported import check_modules, check_offload, disallow_comm_hooks, may_leave_out

# Axes of the device mesh: copies of the model, and shards of each copy.
AXES = ("replicate", "shard")


def shard_modules(brain: BrainProtocol, sharding: Sharding) -> None:
    """Shards each entry of a Brain's modules with ``torch.distributed.fsdp.fully_shard``.

    Each entry is moved to the device, or materialized there, after the previous entry was
    sharded. The device therefore never holds more than one unsharded entry. Entries that are
    already sharded are left unchanged.

    Args:
        brain: The Brain, whose modules are compiled already and which has no optimizers yet.
            A process group has to be initialized.
        sharding: How its modules are to be sharded.

    Raises:
        UnsupportedError: A module cannot be sharded.
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
            # Created here, because this creates process groups and most calls shard nothing.
            options = options or _options(brain, sharding)
            _shard(unit, sharding, options)
            if may_leave_out(brain, unit):
                # Otherwise gradients of different parameters would be averaged without an
                # error.
                unit.set_reduce_scatter_unused_params(True)  # type: ignore[operator]


def check_sharded(brain: BrainProtocol) -> None:
    """Checks that each trained entry is sharded.

    An entry that is not sharded was not moved to the device either.

    Args:
        brain: The Brain, which is about to create its optimizers.

    Raises:
        UnsupportedError: An entry is not sharded, because the recipe overrides the methods
            that would shard it.
    """
    if brain._lightning.sharding is None:
        return
    for name, module in brain.modules.items():
        trained = module is not None and any(p.requires_grad for p in module.parameters())
        if trained and not is_sharded(module):
            raise UnsupportedError(
                f"modules[{name!r}] is not sharded when the optimizers are created. Call "
                "self._wrap_distributed() in on_fit_start, and super()._wrap_distributed() in "
                "an overridden _wrap_distributed. Or use strategy='ddp'."
            )


def _options(brain: BrainProtocol, sharding: Sharding) -> dict[str, Any]:
    """Returns the arguments for ``fully_shard``."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy

    kind, copies = torch.device(brain.device).type, sharding.replicate
    mesh = init_device_mesh(kind, (copies, world_size() // copies), mesh_dim_names=AXES)
    # Otherwise weights stay gathered after a forward pass without gradients.
    options: dict[str, Any] = {"reshard_after_forward": True}
    if sharding.cpu_offload and kind != "cpu":
        check_offload()
        options["offload_policy"] = CPUOffloadPolicy()
    return {"mesh": mesh if copies > 1 else mesh[AXES[1]], **options}


def _shard(unit: Module, sharding: Sharding, options: dict[str, Any]) -> None:
    from torch.distributed.fsdp import fully_shard

    # Ranks may have initialized the unit with different values.
    broadcast([*unit.parameters(), *unit.buffers()])
    if any(p.requires_grad for p in unit.parameters()):
        keep_buffers_equal(unit)
    apply_changes_before_states(unit)
    inner = blocks(unit, sharding.blocks)
    for module in (*inner, unit):
        clone_views(module)
        sharded: Any = fully_shard(module, **options)
        if options["mesh"].device_type == "cpu":
            # Gloo sums gradients when it is asked for their average (torch 2.8).
            sharded.set_force_sum_reduction_for_comms(True)
    _initialize(unit)
    for module in (*inner, unit):
        register_methods(module, (*METHODS, *sharding.methods))
    save_full_module(unit)
    # SpeechBrain's recipes access .module of a wrapped module. FSDP2 does not wrap modules.
    if not hasattr(unit, "module"):
        vars(unit)["module"] = unit
    disallow_comm_hooks(unit)


def _initialize(unit: Module) -> None:
    """Makes FSDP2 initialize itself with the unit as root, before a block of it is called."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    vars(unit)["set_up"] = lambda: remember_gathered(unit)
    register_fsdp_forward_method(unit, "set_up")
    with torch.no_grad():
        unit.set_up()  # type: ignore[operator]
    del vars(unit)["set_up"]
