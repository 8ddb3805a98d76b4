"""Raises errors for modules that cannot be sharded, and explains errors that torch raises."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import distributed
from torch.jit import ScriptModule
from torch.nn import Embedding, EmbeddingBag, Module, Parameter
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from brain_lightning.compat.versions import REDUCES_UNUSED, SHARDS
from brain_lightning.distributed.communication import world_size
from brain_lightning.errors import UnsupportedError
from brain_lightning.protocol import BrainProtocol, optimizers_of, parameters_of

from .blocks import blocks, drops_layers, units
from .evaluate import is_sharded
from .hooks import gathered_of
from .meta import check_resets
from .sharding import AUTO, Sharding
from .tensors import is_shard

logger = logging.getLogger(__name__)

# Parameters that were replaced by shards and that other objects still refer to.
_replaced: WeakIdKeyDictionary = WeakIdKeyDictionary()
UNUSED = (
    "%s parameters of %r have no gradient. If different ranks leave out different parameters, "
    "use --find_unused_parameters, as with strategy='ddp'. Without it gradients of different "
    "parameters are averaged."
)
# The settings with which each entry was sharded.
_settings: WeakKeyDictionary[Module, Sharding] = WeakKeyDictionary()
# Explanations of errors that torch raises if weights are not gathered, by parts of their text.
EXPLANATIONS = {
    ("mixed torch.Tensor and DTensor", "sharding strategy registered"): (
        "brain_lightning: sharded weights are gathered only while an entry of modules is "
        "called. Here the recipe used a part, another method or a parameter of an entry "
        "directly. For a part, add its class to FSDP2Strategy(blocks=[...]), or make it an "
        "entry. For a method, add its name to FSDP2Strategy(methods=[...]). For a parameter, "
        "read it in forward or in such a method."
    ),
    ("out of bounds for storage of size 0",): (
        "brain_lightning: sharded weights are gathered for the backward pass through the "
        "tensors that an entry of modules returned, and released after it. If the loss is "
        "computed from a tensor in an attribute, return this tensor. If the loss needs second "
        "derivatives (torch.autograd.grad with create_graph=True), use strategy='ddp'."
    ),
}


def check_version() -> None:
    """Checks that the version of torch shards correctly.

    Raises:
        UnsupportedError: torch is too old.
    """
    if not SHARDS:
        raise UnsupportedError(
            f"strategy='fsdp2' needs torch 2.8 or newer, and torch {torch.__version__} is "
            "installed. Upgrade torch, or use strategy='ddp'."
        )


def check_not_sharded(brain: BrainProtocol) -> None:
    """Checks that no module is sharded, for a run with another strategy.

    Args:
        brain: The Brain.

    Raises:
        UnsupportedError: An earlier run has sharded a module of the Brain.
    """
    for name, module in brain.modules.items():
        if is_sharded(module):
            raise UnsupportedError(
                f"{name!r} was sharded by an earlier fit with strategy='fsdp2'. Train it with "
                "strategy='fsdp2' again, or create a new Brain and recover its checkpoint."
            )


def check_modules(brain: BrainProtocol, sharding: Sharding) -> None:
    """Checks that the modules of a Brain can be sharded.

    Args:
        brain: The Brain, before it has optimizers.
        sharding: How its modules are to be sharded.

    Raises:
        UnsupportedError: A module cannot be sharded. The message names it, with a remedy.
    """
    if world_size() % sharding.replicate:
        numbers = [str(n) for n in range(1, world_size() + 1) if not world_size() % n]
        raise UnsupportedError(
            f"FSDP2Strategy(replicate={sharding.replicate}) does not divide the number of "
            f"ranks, {world_size()}. Use {' or '.join(numbers)}."
        )
    entries = {name: module for name, module in brain.modules.items() if module is not None}
    _check_shared(entries)
    inside: dict[Module, list[Module]] = {}
    for name, module in entries.items():
        _check_settings(name, module, sharding)
        for unit in units(module):
            _check_unused(brain, unit)
        # An entry that is sharded was checked before it was sharded.
        if not is_sharded(module):
            inside |= _check_entry(name, module, sharding)
    # Sharding changes the class of a module, so names cannot be checked after it.
    if not any(map(is_sharded, entries.values())):
        _check_names(inside, sharding)
    for parameter in brain.modules.parameters():
        if not is_shard(parameter):
            _replaced[parameter] = True


def _check_entry(name: str, module: Module, sharding: Sharding) -> dict[Module, list[Module]]:
    """Checks that an entry can be sharded, and returns its units with their blocks."""
    check_resets(name, module)
    _check_parts(name, module)
    inside = {unit: blocks(unit, sharding.blocks) for unit in units(module)}
    for unit, inner in inside.items():
        _check_tied(name, unit, inner)
        _check_types(name, unit, inner)
    return inside


def _check_parts(name: str, module: Module) -> None:
    """Raises an error for TorchScript modules and for modules with sparse gradients."""
    for path, part in module.named_modules():
        if isinstance(part, ScriptModule) and any(True for _ in part.parameters()):
            raise UnsupportedError(
                f"{name} is TorchScript, which cannot be sharded. Use --compile instead "
                "of --jit."
            )
        if isinstance(part, (Embedding, EmbeddingBag)) and part.sparse:
            where = ".".join(filter(None, (name, path)))
            raise UnsupportedError(
                f"{where} has sparse gradients, which cannot be sharded. Set sparse=False."
            )


def _check_tied(name: str, unit: Module, inner: list[Module]) -> None:
    """Raises an error for a block that shares a parameter with a module outside of the block.

    Some versions of torch would untie the parameter, other versions fail.
    """
    for block in inner:
        own, inside = {id(p): n for n, p in block.named_parameters()}, {*block.modules()}
        for path, part in unit.named_modules():
            for key, parameter in part.named_parameters(recurse=False):
                if id(parameter) in own and part not in inside:
                    where = ".".join(filter(None, (name, path, key)))
                    raise UnsupportedError(
                        f"{where} is the same parameter as {own[id(parameter)]!r} of a block, "
                        f"a {type(block).__name__}. Use FSDP2Strategy(blocks=[...]) with a "
                        "class that contains both, or blocks=[]."
                    )


def _check_settings(name: str, module: Module, sharding: Sharding) -> None:
    """Raises an error for changed settings of a module that is sharded already."""
    first = _settings.setdefault(module, sharding)
    if not is_sharded(module):
        _settings[module] = sharding
        return
    for setting in ("blocks", "methods", "cpu_offload", "replicate"):
        before, now = getattr(first, setting), getattr(sharding, setting)
        if before != now:
            raise UnsupportedError(
                f"{name!r} was sharded by an earlier fit with FSDP2Strategy({setting}="
                f"{before!r}), which cannot be changed. Create a new Brain to use "
                f"{setting}={now!r}."
            )


def _check_shared(entries: dict[str, Module]) -> None:
    """Raises an error for a parameter that two entries share or that cannot be sharded."""
    owners: dict[int, str] = {}
    for name, module in entries.items():
        for key, parameter in module.named_parameters():
            _check_parameter(f"{name}.{key}", parameter)
            first = owners.setdefault(id(parameter), f"{name}.{key}")
            if first.partition(".")[0] != name:
                raise UnsupportedError(
                    f"{name}.{key} and {first} are the same parameter, and each entry of "
                    "modules is sharded separately. Put both modules in one entry."
                )


def check_offload() -> None:
    """Checks that the process group can communicate CPU tensors, for ``cpu_offload``.

    Raises:
        UnsupportedError: The process group supports GPU tensors only.
    """
    if "cpu" not in distributed.get_backend_config():
        raise UnsupportedError(
            "FSDP2Strategy(cpu_offload=True) needs a backend for CPU tensors, and nccl "
            "supports GPU tensors only. Use --distributed_backend=cpu:gloo,cuda:nccl."
        )


def _check_parameter(name: str, parameter: Parameter) -> None:
    if is_lazy(parameter):
        raise UnsupportedError(
            f"{name} is a lazy parameter without a shape. Pass the input size to its module."
        )
    if parameter.dim() == 0:
        raise UnsupportedError(
            f"{name} is a scalar, which cannot be sharded. Use torch.nn.Parameter("
            "torch.tensor([...])), with one element."
        )


def may_leave_out(brain: BrainProtocol, unit: Module) -> str:
    """Returns the option that lets a rank leave out parameters that other ranks use.

    Args:
        brain: The Brain.
        unit: Module to shard.

    Returns:
        The option and its value. An empty string if there is no such option.
    """
    found = "find_unused_parameters=True" if brain.find_unused_parameters else ""
    return found or drops_layers(unit)


def check_first_steps(brain: BrainProtocol, optimizers: Iterable[Optimizer]) -> None:
    """Makes the first step of each optimizer check for missing gradients.

    Args:
        brain: The Brain, whose modules are sharded.
        optimizers: Its optimizers.
    """
    pending = set(optimizers)

    def check(optimizer: Optimizer, *_: object) -> None:
        # The hook is not removed, because hooks must not be removed while hooks are called.
        if optimizer not in pending:
            return
        pending.remove(optimizer)
        own = set(map(id, parameters_of(optimizer)))
        for name, module in brain.modules.items():
            # "if module" would call len(), which compiled modules do not support.
            if module is not None:
                _check_returned(name, module)
                if world_size() > 1 and not may_leave_out(brain, module):
                    _warn_of_unused(name, module, own)

    for each in pending:
        each.register_step_pre_hook(check)


def _check_returned(name: str, module: Module) -> None:
    """Raises an error for gradients of a tensor that the module did not return.

    FSDP2 averages gradients only in the backward pass through tensors that the module
    returned.
    """
    for unit in units(module):
        if any(parameter.grad is not None for parameter in gathered_of(unit)):
            raise UnsupportedError(
                f"{name!r} would not be trained, because the loss is computed from a tensor "
                "that it did not return, such as a tensor in an attribute. Return all tensors "
                "that the loss uses."
            )


def _warn_of_unused(name: str, module: Module, own: set[int]) -> None:
    """Warns of parameters of an optimizer that this rank left out of the loss.

    ``DistributedDataParallel`` raises an error for them. FSDP2 does not. If ranks leave out
    different parameters, it averages gradients of different parameters.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    unused = [p for p in trained if id(p) in own and p.grad is None]
    if unused and len(unused) < len(trained):
        logger.warning(UNUSED, len(unused), name)


def _check_unused(brain: BrainProtocol, unit: Module) -> None:
    """Raises an error if ranks may leave out different parameters and torch is too old."""
    if (option := may_leave_out(brain, unit)) and not REDUCES_UNUSED:
        raise UnsupportedError(
            f"{option} lets each rank leave out different parameters, and torch "
            f"{torch.__version__} would average gradients of different parameters with "
            "strategy='fsdp2'. Set it to 0 or False, or upgrade torch to a version whose "
            "FSDPModule has set_reduce_scatter_unused_params."
        )


def _check_types(name: str, unit: Module, inner: list[Module]) -> None:
    """Raises an error for parameters of different dtypes that are gathered together."""
    taken: set[int] = set()
    for group in (*inner, unit):
        own = [p for p in group.parameters() if id(p) not in taken]
        taken |= set(map(id, own))
        types = sorted({str(p.dtype).removeprefix("torch.") for p in own})
        if len(types) > 1:
            raise UnsupportedError(
                f"{name} has parameters of {' and '.join(types)} that are gathered together. "
                "Convert them to one type, or put the parts of each type in separate blocks "
                "with FSDP2Strategy(blocks=[...])."
            )


def _check_names(inside: dict[Module, list[Module]], sharding: Sharding) -> None:
    """Raises an error for names of classes and methods that no module has."""
    parts = [part for unit in inside for part in unit.modules()]
    classes = sorted({type(p).__name__ for p in parts if any(True for _ in p.parameters())})
    for name in () if sharding.blocks == AUTO else sharding.blocks:
        if name not in classes:
            raise UnsupportedError(
                f"FSDP2Strategy(blocks=[{name!r}]): no module with parameters is of that "
                f"class. Available classes: {', '.join(classes)}."
            )
    gathered = [*inside, *(block for inner in inside.values() for block in inner)]
    for name in sharding.methods:
        if not any(_has_method(module, name) for module in gathered):
            raise UnsupportedError(
                f"FSDP2Strategy(methods=[{name!r}]): no entry of modules, and no block, has "
                f"that method. {_suggestion(name, parts, gathered)}"
            )


def _has_method(module: Module, name: str) -> bool:
    method = getattr(module, name, None)
    return callable(method) and not isinstance(method, Module)


def _suggestion(name: str, parts: list[Module], gathered: list[Module]) -> str:
    """Returns a remedy for a method name that no entry and no block has."""
    owners = {type(part).__name__ for part in parts if _has_method(part, name)}
    named = [getattr(module, name, None) for module in gathered]
    owners |= {type(module).__name__ for module in named if isinstance(module, Module)}
    if owners:
        return f"A part of an entry has it. Make this part a block: blocks={sorted(owners)}."
    own = {method for module in gathered for method in dir(type(module))} - {*dir(Module)}
    names = ", ".join(sorted(n for n in own if not n.startswith("_")))
    return f"Available methods: {names or 'none'}."


def check_optimizers(brain: BrainProtocol) -> None:
    """Checks that no optimizer has parameters that were replaced by shards.

    Args:
        brain: The Brain, after ``init_optimizers``.

    Raises:
        UnsupportedError: An optimizer has such parameters.
    """
    if not _replaced:
        return
    for name, optimizer in optimizers_of(brain):
        if any(p in _replaced for p in parameters_of(optimizer)):
            raise UnsupportedError(
                f"{name} was created before the modules were sharded, and would train "
                "nothing. Create it in init_optimizers. If the recipe replaces an entry of "
                "modules, create it after self._wrap_distributed()."
            )


def disallow_comm_hooks(module: Module) -> None:
    """Adds a ``register_comm_hook`` method to a module, which raises ``UnsupportedError``.

    Args:
        module: Module that ``fully_shard`` was called on.
    """

    def register_comm_hook(*_: object, **__: object) -> NoReturn:
        raise UnsupportedError(
            "register_comm_hook is for gradients that DistributedDataParallel averages, and "
            "strategy='fsdp2' does not use DistributedDataParallel. Remove the call."
        )

    vars(module)["register_comm_hook"] = register_comm_hook


def explanation(error: Exception) -> str:
    """Explains an error that torch raises because of sharded weights.

    Args:
        error: Any error.

    Returns:
        An explanation with the remedy. An empty string for other errors.
    """
    found = (
        text
        for fragments, text in EXPLANATIONS.items()
        if any(fragment in str(error) for fragment in fragments)
    )
    return next(found, "")
