"""Checks whether a strategy is supported, and accesses private attributes of strategies."""

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

# Prefixes of the names of strategies that shard the whole LightningModule.
OF_WHOLE_MODULES = ("fsdp", "deepspeed", "model_parallel")

# Arguments of DDPStrategy for one DistributedDataParallel around the whole module.
WHOLE_MODULE = (
    "_ddp_comm_hook",
    "_ddp_comm_state",
    "_ddp_comm_wrapper",
    "_model_averaging_period",
)


def is_parallel(trainer: Trainer) -> bool:
    """Whether a Trainer has a strategy for several processes, even if there is only one.

    Args:
        trainer: The Trainer, before or after it starts its processes.
    """
    return isinstance(trainer.strategy, DDPStrategy)


def check_given_strategy(strategy: object) -> None:
    """Raises for unsupported strategies before a Trainer is created.

    Otherwise the Trainer's constructor might raise a less helpful error, for example because
    there is no GPU.

    Args:
        strategy: The Trainer argument: a name, a strategy, or None.

    Raises:
        UnsupportedError: If the strategy shards the whole LightningModule.
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
        f"{name} is not supported for a Brain, because it wraps the whole LightningModule. "
        "Gradients of a recipe's loss.backward() would not be averaged. If the model is "
        "larger than one device, use strategy='fsdp2', which shards each entry of modules. "
        "Otherwise use 'ddp', 'ddp_find_unused_parameters_true', DDPStrategy(...) or one "
        "device."
    )


def _check_kind(strategy: Strategy) -> None:
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise _cannot_run(type(strategy).__name__)


def check_strategy(trainer: Trainer) -> None:
    """Raises if the strategy of a Trainer does not support a Brain.

    Args:
        trainer: The Trainer, before it starts its processes.

    Raises:
        UnsupportedError: If the strategy or one of its arguments is not supported.
    """
    strategy = trainer.strategy
    _check_kind(strategy)
    if not isinstance(strategy, DDPStrategy):
        return
    name = type(strategy).__name__
    if strategy._start_method != "popen":
        raise UnsupportedError(
            f"{name}(start_method={strategy._start_method!r}) would train a copy of the Brain "
            "in another process, and its weights would be lost. Use strategy='ddp' or "
            "torchrun."
        )
    if isinstance(strategy, FSDP2Strategy):
        _check_sharding(strategy)
    for argument in WHOLE_MODULE:
        if getattr(strategy, argument) is not None:
            raise UnsupportedError(
                f"{name}({argument[1:]}=...) is not supported: it is for one "
                "DistributedDataParallel, but a Brain has one for each entry of its modules. "
                "Remove the argument."
            )


def _check_sharding(strategy: FSDP2Strategy) -> None:
    given = [name for name in WHOLE_MODULE if getattr(strategy, name) is not None]
    # find_unused_parameters has a meaning for shards, too.
    given += [name for name in strategy._ddp_kwargs if name != "find_unused_parameters"]
    if given:
        raise UnsupportedError(
            f"FSDP2Strategy({given[0].removeprefix('_')}=...) is not supported: it is for "
            "DistributedDataParallel, which FSDP2 does not use. Remove the argument."
        )
    check_version()


def ddp_arguments(trainer: Trainer) -> dict[str, Any]:
    """Returns the arguments of the strategy for ``DistributedDataParallel``.

    Args:
        trainer: A Trainer whose strategy ``is_parallel``.
    """
    strategy = trainer.strategy
    assert isinstance(strategy, DDPStrategy)
    return strategy._ddp_kwargs


def set_backend(trainer: Trainer, backend: str, temporary: TemporaryAttributes) -> str:
    """Sets the backend of the process group, unless the user's strategy sets it.

    Args:
        trainer: A Trainer whose strategy ``is_parallel``, before it creates a process group.
        backend: nccl, gloo or mpi.
        temporary: Records the changes.

    Returns:
        The backend of the strategy.
    """
    strategy = trainer.strategy
    assert isinstance(strategy, DDPStrategy)
    chosen = strategy.process_group_backend
    if chosen is None:
        temporary.set(strategy, "_process_group_backend", backend)
    return chosen or backend


def disable_synchronization(module: LightningModule) -> None:
    """Keeps the strategy from broadcasting the weights of rank 0 before an evaluation.

    The ranks of a Brain have identical weights, but their buffers may differ, for example the
    running statistics of a normalization.

    Args:
        module: The module before the Trainer's ``setup``.
    """
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(module, names)


def leave_on(module: LightningModule, device: torch.device) -> bool:
    """Sets the device of a module without moving it, if all tensors are on this device.

    Calling ``to`` for ten thousand tensors takes as long as a training step, even if no
    tensor moves.

    Args:
        module: The module.
        device: The device to which a strategy moves the module.

    Returns:
        Whether there is nothing to move.
    """
    tensors = chain(module.parameters(), module.buffers())
    # Other modules may move more tensors, for example a torchmetrics metric its state.
    are_plain = all(
        part._apply.__module__.startswith("torch.nn.") for part in module.modules()
    )
    is_there = are_plain and all(tensor.device == device for tensor in tensors)
    if is_there:
        _update_properties(module, device=device)
    return is_there


def shards_training_data(trainer: Trainer) -> bool:
    """Whether the Trainer splits the training set between the ranks.

    Args:
        trainer: The Trainer.
    """
    return is_parallel(trainer) and trainer._accelerator_connector.use_distributed_sampler
