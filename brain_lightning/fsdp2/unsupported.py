"""What cannot be sharded, refused before training; and what torch's errors mean."""

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

# Parameters that were replaced by shards, while something has them still.
_replaced: WeakIdKeyDictionary = WeakIdKeyDictionary()
UNUSED = (
    "%s parameters of %r have no gradient. If processes leave out different ones, they need "
    "--find_unused_parameters, as with strategy='ddp': without it gradients of different "
    "parameters are averaged"
)
# Entries, and the settings that they were sharded with.
_settings: WeakKeyDictionary[Module, Sharding] = WeakKeyDictionary()
# What torch says of weights that are not whole, and why they are not.
MEANINGS = {
    ("mixed torch.Tensor and DTensor", "sharding strategy registered"): (
        "brain_lightning: weights in shards are gathered while an entry of modules is called, "
        "and here a part, another method or a parameter of one was used by itself. A part: "
        "name its class in FSDP2Strategy(blocks=[...]), or make it an entry. A method: name "
        "it in FSDP2Strategy(methods=[...]). A parameter: read it in forward, or in such a "
        "method"
    ),
    ("out of bounds for storage of size 0",): (
        "brain_lightning: weights in shards are gathered for the backward pass of what an "
        "entry of modules returned, and released after it. A loss that is made of a tensor "
        "on an attribute needs it returned; a gradient of a gradient (torch.autograd.grad "
        "with create_graph=True) needs strategy='ddp'"
    ),
}


def check_version() -> None:
    """Refuses a version of torch that shards wrongly.

    Raises:
        UnsupportedError: It does.
    """
    if not SHARDS:
        raise UnsupportedError(
            f"strategy='fsdp2' needs torch 2.8 or newer, and this is torch {torch.__version__}"
        )


def check_not_sharded(brain: BrainProtocol) -> None:
    """Refuses to train modules in shards by another strategy.

    Args:
        brain: The Brain.

    Raises:
        UnsupportedError: An earlier run has sharded a module of it.
    """
    for name, module in brain.modules.items():
        if is_sharded(module):
            raise UnsupportedError(
                f"{name!r} is in shards since an earlier fit with strategy='fsdp2': train it "
                "with that strategy again, or make a new Brain and recover its checkpoint"
            )


def check_modules(brain: BrainProtocol, sharding: Sharding) -> None:
    """Refuses modules that cannot be sharded.

    Args:
        brain: The Brain, before it has optimizers.
        sharding: How its modules are to be sharded.

    Raises:
        UnsupportedError: There is one; it is named, with a remedy.
    """
    if world_size() % sharding.replicate:
        numbers = [str(n) for n in range(1, world_size() + 1) if not world_size() % n]
        raise UnsupportedError(
            f"FSDP2Strategy(replicate={sharding.replicate}) does not divide the number of "
            f"processes, {world_size()}: give {' or '.join(numbers)}"
        )
    entries = {name: module for name, module in brain.modules.items() if module is not None}
    _check_shared(entries)
    inside: dict[Module, list[Module]] = {}
    for name, module in entries.items():
        _check_settings(name, module, sharding)
        for unit in units(module):
            _check_unused(brain, unit)
        # What is sharded was looked through before it was.
        if not is_sharded(module):
            inside |= _check_entry(name, module, sharding)
    # An entry that is sharded has another class.
    if not any(map(is_sharded, entries.values())):
        _check_names(inside, sharding)
    for parameter in brain.modules.parameters():
        if not is_shard(parameter):
            _replaced[parameter] = True


def _check_entry(name: str, module: Module, sharding: Sharding) -> dict[Module, list[Module]]:
    """Refuses an entry that cannot be sharded; its units, with their blocks."""
    check_resets(name, module)
    _check_parts(name, module)
    inside = {unit: blocks(unit, sharding.blocks) for unit in units(module)}
    for unit, inner in inside.items():
        _check_tied(name, unit, inner)
        _check_types(name, unit, inner)
    return inside


def _check_parts(name: str, module: Module) -> None:
    """Refuses parts that have no shards, or no gradients of shards."""
    for path, part in module.named_modules():
        if isinstance(part, ScriptModule) and any(True for _ in part.parameters()):
            raise UnsupportedError(
                f"{name} is TorchScript, which cannot be sharded: use --compile instead "
                "of --jit"
            )
        if isinstance(part, (Embedding, EmbeddingBag)) and part.sparse:
            where = ".".join(filter(None, (name, path)))
            raise UnsupportedError(
                f"{where} has sparse gradients, which cannot be sharded: give it sparse=False"
            )


def _check_tied(name: str, unit: Module, inner: list[Module]) -> None:
    """Refuses a block that shares a parameter outward: some torch unties it, others fail."""
    for block in inner:
        own, inside = {id(p): n for n, p in block.named_parameters()}, {*block.modules()}
        for path, part in unit.named_modules():
            for key, parameter in part.named_parameters(recurse=False):
                if id(parameter) in own and part not in inside:
                    where = ".".join(filter(None, (name, path, key)))
                    raise UnsupportedError(
                        f"{where} is {own[id(parameter)]!r} of a block as well, a "
                        f"{type(block).__name__}: name a class in FSDP2Strategy(blocks=[...]) "
                        "that has both, or none"
                    )


def _check_settings(name: str, module: Module, sharding: Sharding) -> None:
    """Refuses other settings for a module that is sharded already."""
    first = _settings.setdefault(module, sharding)
    if not is_sharded(module):
        _settings[module] = sharding
        return
    for setting in ("blocks", "methods", "cpu_offload", "replicate"):
        before, now = getattr(first, setting), getattr(sharding, setting)
        if before != now:
            raise UnsupportedError(
                f"{name!r} is in shards since an earlier fit with FSDP2Strategy({setting}="
                f"{before!r}), and stays so: {setting}={now!r} needs a new Brain"
            )


def _check_shared(entries: dict[str, Module]) -> None:
    """Refuses a parameter of two entries, and one of which there are no shards."""
    owners: dict[int, str] = {}
    for name, module in entries.items():
        for key, parameter in module.named_parameters():
            _check_parameter(f"{name}.{key}", parameter)
            first = owners.setdefault(id(parameter), f"{name}.{key}")
            if first.partition(".")[0] != name:
                raise UnsupportedError(
                    f"{name}.{key} and {first} are the same parameter, and each entry of "
                    "modules is sharded by itself: put both in one entry"
                )


def check_offload() -> None:
    """Refuses shards on the CPU of which processes cannot communicate.

    Raises:
        UnsupportedError: The process group is for GPUs alone.
    """
    if "cpu" not in distributed.get_backend_config():
        raise UnsupportedError(
            "FSDP2Strategy(cpu_offload=True): processes also communicate about shards on the "
            "CPU, which nccl does not: --distributed_backend=cpu:gloo,cuda:nccl"
        )


def _check_parameter(name: str, parameter: Parameter) -> None:
    if is_lazy(parameter):
        raise UnsupportedError(
            f"{name} has no shape yet: give its module the size of its input"
        )
    if parameter.dim() == 0:
        raise UnsupportedError(
            f"{name} is a scalar, of which there are no shards: make it torch.nn.Parameter("
            "torch.tensor([...])), with one element"
        )


def may_leave_out(brain: BrainProtocol, unit: Module) -> str:
    """By which option a process may leave out parameters that others use.

    Args:
        brain: The Brain.
        unit: What is sharded.

    Returns:
        The option and its value; empty where there is none.
    """
    found = "find_unused_parameters=True" if brain.find_unused_parameters else ""
    return found or drops_layers(unit)


def check_first_steps(brain: BrainProtocol, optimizers: Iterable[Optimizer]) -> None:
    """Has the first step of each optimizer look for gradients that are not there.

    Args:
        brain: The Brain, whose modules are in shards.
        optimizers: Its optimizers.
    """
    pending = set(optimizers)

    def check(optimizer: Optimizer, *_: object) -> None:
        # The hook stays: while hooks are called, none may be removed.
        if optimizer not in pending:
            return
        pending.remove(optimizer)
        own = set(map(id, parameters_of(optimizer)))
        for name, module in brain.modules.items():
            # Not as a condition: what is compiled has no length.
            if module is not None:
                _check_returned(name, module)
                if world_size() > 1 and not may_leave_out(brain, module):
                    _warn_of_unused(name, module, own)

    for each in pending:
        each.register_step_pre_hook(check)


def _check_returned(name: str, module: Module) -> None:
    """Refuses gradients that were not averaged, of a loss that a module did not return.

    FSDP2 averages them after the backward pass of what the module returned.
    """
    for unit in units(module):
        if any(parameter.grad is not None for parameter in gathered_of(unit)):
            raise UnsupportedError(
                f"{name!r} would not be trained: the loss is made of a tensor that it did not "
                "return, such as one that it keeps on an attribute. Return all tensors that "
                "the loss is made of"
            )


def _warn_of_unused(name: str, module: Module, own: set[int]) -> None:
    """Warns of parameters of an optimizer that this process left out.

    ``DistributedDataParallel`` ends with an error there. Torch's shards say nothing, and
    average gradients of different parameters where processes left out different ones.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    unused = [p for p in trained if id(p) in own and p.grad is None]
    if unused and len(unused) < len(trained):
        logger.warning(UNUSED, len(unused), name)


def _check_unused(brain: BrainProtocol, unit: Module) -> None:
    """Refuses parameters that one process may leave out, where others would get wrong ones."""
    if (option := may_leave_out(brain, unit)) and not REDUCES_UNUSED:
        raise UnsupportedError(
            f"{option}: each process may leave out other parameters, and torch "
            f"{torch.__version__} would average gradients of different ones with "
            "strategy='fsdp2'. Set it to 0 or False, or upgrade torch until FSDPModule has "
            "set_reduce_scatter_unused_params"
        )


def _check_types(name: str, unit: Module, inner: list[Module]) -> None:
    """Refuses what is gathered together and has different types."""
    taken: set[int] = set()
    for group in (*inner, unit):
        own = [p for p in group.parameters() if id(p) not in taken]
        taken |= set(map(id, own))
        types = sorted({str(p.dtype).removeprefix("torch.") for p in own})
        if len(types) > 1:
            raise UnsupportedError(
                f"{name} has parameters of {' and '.join(types)} that are gathered together: "
                "give them one type, or name the classes of the parts that have each in "
                "FSDP2Strategy(blocks=[...])"
            )


def _check_names(inside: dict[Module, list[Module]], sharding: Sharding) -> None:
    """Refuses names of classes and of methods that no module has."""
    parts = [part for unit in inside for part in unit.modules()]
    classes = sorted({type(p).__name__ for p in parts if any(True for _ in p.parameters())})
    for name in () if sharding.blocks == AUTO else sharding.blocks:
        if name not in classes:
            raise UnsupportedError(
                f"FSDP2Strategy(blocks=[{name!r}]): no module with parameters is of that "
                f"class; there are {', '.join(classes)}"
            )
    gathered = [*inside, *(block for inner in inside.values() for block in inner)]
    for name in sharding.methods:
        if not any(_has_method(module, name) for module in gathered):
            raise UnsupportedError(
                f"FSDP2Strategy(methods=[{name!r}]): no entry of modules, and no block, has "
                f"that method; {_where_it_is(name, parts, gathered)}"
            )


def _has_method(module: Module, name: str) -> bool:
    method = getattr(module, name, None)
    return callable(method) and not isinstance(method, Module)


def _where_it_is(name: str, parts: list[Module], gathered: list[Module]) -> str:
    """What was meant by a method that no entry has."""
    owners = {type(part).__name__ for part in parts if _has_method(part, name)}
    named = [getattr(module, name, None) for module in gathered]
    owners |= {type(module).__name__ for module in named if isinstance(module, Module)}
    if owners:
        return f"a part of one has: name its class, blocks={sorted(owners)}"
    own = {method for module in gathered for method in dir(type(module))} - {*dir(Module)}
    return f"there are {', '.join(sorted(n for n in own if not n.startswith('_'))) or 'none'}"


def check_optimizers(brain: BrainProtocol) -> None:
    """Refuses an optimizer of parameters that were replaced by shards.

    Args:
        brain: The Brain, after ``init_optimizers``.

    Raises:
        UnsupportedError: There is one.
    """
    if not _replaced:
        return
    for name, optimizer in optimizers_of(brain):
        if any(p in _replaced for p in parameters_of(optimizer)):
            raise UnsupportedError(
                f"{name} was made before the modules were sharded, and would train nothing: "
                "make it in init_optimizers, or after self._wrap_distributed() where an entry "
                "of modules is replaced"
            )


def refuse_comm_hooks(module: Module) -> None:
    """Gives a module ``DistributedDataParallel.register_comm_hook``, which refuses in words.

    Args:
        module: A module that ``fully_shard`` was called on.
    """

    def register_comm_hook(*_: object, **__: object) -> NoReturn:
        raise UnsupportedError(
            "register_comm_hook is for gradients that DistributedDataParallel averages, and "
            "strategy='fsdp2' has none of these: leave it out"
        )

    vars(module)["register_comm_hook"] = register_comm_hook


def explanation(error: Exception) -> str:
    """What an error of torch's means where weights are in shards.

    Args:
        error: Any error.

    Returns:
        A sentence with the remedy, or nothing for another error.
    """
    found = (
        meaning
        for said, meaning in MEANINGS.items()
        if any(words in str(error) for words in said)
    )
    return next(found, "")
