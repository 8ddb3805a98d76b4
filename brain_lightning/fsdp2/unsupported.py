"""What cannot be sharded, refused before training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed
from torch.nn import Module, Parameter
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from brain_lightning.compat.versions import SHARDS
from brain_lightning.distributed.communication import world_size
from brain_lightning.errors import UnsupportedError
from brain_lightning.protocol import BrainProtocol, hparams_of

from .blocks import blocks, units
from .meta import check_resets
from .sharding import Sharding
from .tensors import is_shard


def check_version() -> None:
    """Refuses a version of torch that shards wrongly.

    Raises:
        UnsupportedError: It does.
    """
    if not SHARDS:
        raise UnsupportedError(
            f"strategy='fsdp2' needs torch 2.8 or newer, and this is torch {torch.__version__}"
        )


def check_modules(brain: BrainProtocol, sharding: Sharding) -> None:
    """Refuses modules that cannot be sharded.

    Args:
        brain: The Brain, before it has optimizers.
        sharding: How its modules are to be sharded.

    Raises:
        UnsupportedError: There is one; it is named, with a remedy.
    """
    if brain.jit:
        raise UnsupportedError("--jit makes modules that cannot be sharded: use --compile")
    if world_size() % sharding.replicate:
        raise UnsupportedError(
            f"FSDP2Strategy(replicate={sharding.replicate}) does not divide the "
            f"{world_size()} processes"
        )
    owners: dict[int, str] = {}
    for name, module in brain.modules.items():
        for key, parameter in () if module is None else module.named_parameters():
            _check_parameter(f"{name}.{key}", parameter)
            first = owners.setdefault(id(parameter), f"{name}.{key}")
            if first.partition(".")[0] != name:
                raise UnsupportedError(
                    f"{name}.{key} and {first} are the same parameter, and each entry of "
                    "modules is sharded by itself: put both in one entry"
                )
        for unit in () if module is None else units(module):
            _check_types(name, unit, sharding)
        if module is not None:
            check_resets(name, module)
    _check_optimizers(brain)


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


def _check_types(name: str, unit: Module, sharding: Sharding) -> None:
    """Refuses what is gathered together and has different types."""
    taken: set[int] = set()
    for group in (*blocks(unit, sharding.blocks), unit):
        own = [p for p in group.parameters() if id(p) not in taken]
        taken |= set(map(id, own))
        types = sorted({str(p.dtype).removeprefix("torch.") for p in own})
        if len(types) > 1:
            raise UnsupportedError(
                f"{name} has parameters of {' and '.join(types)} that are gathered together: "
                "give them one type, or name the classes of the parts that have each in "
                "FSDP2Strategy(blocks=[...])"
            )


def _check_optimizers(brain: BrainProtocol) -> None:
    """Refuses an optimizer whose parameters are about to be replaced by shards."""
    replaced = {id(p) for p in brain.modules.parameters() if not is_shard(p)}
    for name, optimizer in _optimizers(brain):
        if any(id(p) in replaced for group in optimizer.param_groups for p in group["params"]):
            raise UnsupportedError(
                f"{name} was made before the modules were sharded, and would train nothing: "
                "make it in init_optimizers"
            )


def _optimizers(brain: BrainProtocol) -> Iterator[tuple[str, Optimizer]]:
    for owner, values in {"self": vars(brain), "hparams": hparams_of(brain)}.items():
        for name, value in values.items():
            found: dict[str, Any] = value if isinstance(value, dict) else {"": value}
            for key, each in found.items():
                if isinstance(each, Optimizer):
                    yield f"{owner}.{name}" + (f"[{key!r}]" if key else ""), each
