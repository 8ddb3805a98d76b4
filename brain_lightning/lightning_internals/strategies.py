"""Which strategies run a Brain, and what of them is the Brain's to do."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel

from brain_lightning.errors import UnsupportedError
from brain_lightning.fsdp2.strategy import NAME, FSDP2Strategy
from brain_lightning.fsdp2.unsupported import check_version
from brain_lightning.temporary import TemporaryAttributes

# How names of strategies begin that shard a whole LightningModule.
OF_WHOLE_MODULES = ("fsdp", "deepspeed", "model_parallel")

# Arguments of DDPStrategy that speak of one DistributedDataParallel for the whole module.
WHOLE_MODULE = (
    "_ddp_comm_hook",
    "_ddp_comm_state",
    "_ddp_comm_wrapper",
    "_model_averaging_period",
)


def is_parallel(trainer: Trainer) -> bool:
    """Whether a Trainer wraps modules for several processes, even if there is only one.

    Args:
        trainer: The Trainer, before or after it has started its processes.
    """
    return isinstance(trainer.strategy, DDPStrategy)


def check_given_strategy(strategy: object) -> None:
    """Refuses strategies that a Trainer may not even be made with, for want of a GPU say.

    Args:
        strategy: What a Trainer is to be given: a name, a strategy, or nothing.

    Raises:
        UnsupportedError: It is one that shards the whole LightningModule, or its name.
    """
    if isinstance(strategy, Strategy):
        _check_kind(strategy)
    if (
        isinstance(strategy, str)
        and strategy != NAME
        and strategy.startswith(OF_WHOLE_MODULES)
    ):
        raise _cannot_run(f"strategy={strategy!r}")


def _cannot_run(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name} cannot run a Brain: it wraps the whole LightningModule, and gradients of "
        "a recipe's own loss.backward() would not be averaged. Use strategy='fsdp2', which "
        "shards each entry of modules, for a model larger than one device; else 'ddp', "
        "'ddp_find_unused_parameters_true', DDPStrategy(...) or one device"
    )


def _check_kind(strategy: Strategy) -> None:
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise _cannot_run(type(strategy).__name__)


def check_strategy(trainer: Trainer) -> None:
    """Refuses the strategies that a Brain cannot run on.

    Args:
        trainer: The Trainer, before it starts its processes.

    Raises:
        UnsupportedError: Its strategy is one of those, or has an argument that is.
    """
    strategy = trainer.strategy
    _check_kind(strategy)
    if not isinstance(strategy, DDPStrategy):
        return
    name = type(strategy).__name__
    if strategy._start_method != "popen":
        raise UnsupportedError(
            f"{name}(start_method={strategy._start_method!r}) trains a copy of the Brain in "
            "another process, and what it learns stays there: use strategy='ddp', or torchrun"
        )
    if isinstance(strategy, FSDP2Strategy):
        _check_sharding(strategy)
    for argument in WHOLE_MODULE:
        if getattr(strategy, argument) is not None:
            raise UnsupportedError(
                f"{name}({argument[1:]}=...) is for one DistributedDataParallel, and a Brain "
                "has one for each entry of its modules: leave it out"
            )


def _check_sharding(strategy: FSDP2Strategy) -> None:
    given = [name for name in WHOLE_MODULE if getattr(strategy, name) is not None]
    # It has a meaning for shards too.
    given += [name for name in strategy._ddp_kwargs if name != "find_unused_parameters"]
    if given:
        raise UnsupportedError(
            f"FSDP2Strategy({given[0].removeprefix('_')}=...) is for DistributedDataParallel, "
            "of which there is none: leave it out"
        )
    check_version()


def ddp_arguments(trainer: Trainer) -> dict[str, Any]:
    """The arguments of the strategy that are for ``DistributedDataParallel``.

    Args:
        trainer: A Trainer whose strategy ``is_parallel``.
    """
    strategy = trainer.strategy
    assert isinstance(strategy, DDPStrategy)
    return strategy._ddp_kwargs


def set_backend(trainer: Trainer, backend: str, temporary: TemporaryAttributes) -> str:
    """Chooses how processes communicate, unless the user's strategy does.

    Args:
        trainer: A Trainer whose strategy ``is_parallel``, without a process group yet.
        backend: nccl, gloo or mpi.
        temporary: Records what is changed.

    Returns:
        The backend that the strategy has now.
    """
    strategy = trainer.strategy
    assert isinstance(strategy, DDPStrategy)
    chosen = strategy.process_group_backend
    if chosen is None:
        temporary.set(strategy, "_process_group_backend", backend)
    return chosen or backend


def disable_synchronization(module: LightningModule) -> None:
    """Keeps the strategy from giving every process the first one's weights to evaluate.

    A Brain's processes have the same ones, but for what is each process's own, such
    as the running statistics of a normalization.

    Args:
        module: The module before the Trainer's ``setup``.
    """
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(module, names)


def leave_on(module: LightningModule, device: torch.device) -> bool:
    """Lets a module know its device, if all of it is there.

    To move ten thousand tensors to where they are takes as long as a step of them.

    Args:
        module: The module.
        device: Where a strategy moves it to.

    Returns:
        Whether there is nothing to move.
    """
    tensors = chain(module.parameters(), module.buffers())
    # Others move tensors that nobody else knows of, as a metric of torchmetrics its state.
    are_plain = all(
        part._apply.__module__.startswith("torch.nn.") for part in module.modules()
    )
    is_there = are_plain and all(tensor.device == device for tensor in tensors)
    if is_there:
        _update_properties(module, device=device)
    return is_there


def shards_training_data(trainer: Trainer) -> bool:
    """Whether the Trainer gives each process its part of the training set.

    Args:
        trainer: The Trainer.
    """
    return is_parallel(trainer) and trainer._accelerator_connector.use_distributed_sampler
