"""Trainer strategy that shards a Brain's modules."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor
from torch.optim import Optimizer

from brain_lightning.errors import UnsupportedError

from .sharding import AUTO, Sharding

NAME = "fsdp2"
# Backends for collectives on CPU tensors (offloaded shards) and GPU tensors (weights).
OF_EACH_DEVICE = "cpu:gloo,cuda:nccl"


class FSDP2Strategy(DDPStrategy):
    """Trains a Brain with sharded weights, gradients and optimizer states.

    Each rank stores one shard of them. While an entry of ``modules``, or a block of it,
    computes, its weights are gathered (``torch.distributed.fsdp.fully_shard``). Launching,
    samplers, checkpoints and results are the same as with ``strategy="ddp"``.
    ``Trainer(strategy="fsdp2")`` uses this strategy with its defaults.

    Args:
        blocks: Names of classes whose instances are gathered one by one, instead of the whole
            entry at once. ``"auto"`` selects layers of a ``ModuleList`` with a million or
            more parameters. ``[]`` selects none.
        methods: Names of methods, other than ``forward``, that the recipe calls on an entry or
            a block and that use its weights. The methods in ``methods.METHODS`` are always
            included.
        gather_to_evaluate: Whether each rank gathers all weights for VALID and TEST, so that
            ranks may evaluate different batches. Use ``False`` if the model does not fit on
            one device: then all ranks have to evaluate the same number of batches with the
            same calls.
        cpu_offload: Whether to store shards in CPU memory, where the optimizer then steps. No
            effect if the device is the CPU.
        replicate: Number of copies of the model (HSDP). Each copy is sharded over the number
            of ranks divided by ``replicate``.
        sharded_checkpoints: Whether each rank writes its own shards to a ``CKPT+`` directory.
            By default rank 0 writes full tensors.
        **kwargs: Arguments of Lightning's ``DDPStrategy``, except for those that it passes on
            to ``DistributedDataParallel``.

    Raises:
        UnsupportedError: A value is invalid.
    """

    strategy_name = NAME

    def __init__(
        self,
        blocks: Collection[str] | str = AUTO,
        methods: Collection[str] = (),
        gather_to_evaluate: bool = True,
        cpu_offload: bool = False,
        replicate: int = 1,
        sharded_checkpoints: bool = False,
        **kwargs: Any,
    ) -> None:
        if cpu_offload and torch.cuda.is_available():
            kwargs.setdefault("process_group_backend", OF_EACH_DEVICE)
        super().__init__(**kwargs)
        self.sharding = Sharding(
            blocks, methods, gather_to_evaluate, cpu_offload, replicate, sharded_checkpoints
        )

    def connect(self, model: LightningModule) -> None:
        """Connects the strategy to the LightningModule, as in Lightning.

        Args:
            model: The LightningModule.

        Raises:
            UnsupportedError: The module was not generated for a Brain, so no module of it
                would be sharded.
        """
        if not hasattr(model, "brain"):
            raise UnsupportedError(
                f"strategy='fsdp2' shards the modules of a Brain, and {type(model).__name__} "
                "has no Brain. Pass to_lightning(brain) to the Trainer, or use another "
                "strategy."
            )
        super().connect(model)

    def setup(self, trainer: Trainer) -> None:
        """Sets up the run as in Lightning.

        Lightning moves recovered optimizer states to the device. With ``cpu_offload`` they are
        moved back to the CPU.

        Args:
            trainer: The Trainer.
        """
        super().setup(trainer)
        if self.sharding.cpu_offload:
            for optimizer in self.optimizers:
                move_to_parameters(optimizer)

    def model_to_device(self) -> None:
        """Does nothing, because ``shard_modules`` moves and shards the entries one by one."""

    def configure_ddp(self) -> None:
        """Does nothing, because each entry of ``modules`` is sharded after it was compiled."""


def move_to_parameters(optimizer: Optimizer) -> None:
    """Moves the state of an optimizer to the devices of its parameters.

    Args:
        optimizer: The optimizer, with all of its parameters.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            # The optimizer decides on which device it counts steps.
            if isinstance(value, Tensor) and key != "step":
                state[key] = value.to(parameter.device)


def shards(trainer: Any) -> bool:
    """Returns whether a Trainer, or its arguments, select a strategy that shards modules.

    Args:
        trainer: A Trainer, or a mapping of Trainer arguments.
    """
    is_mapping = isinstance(trainer, Mapping)
    strategy = trainer.get("strategy") if is_mapping else getattr(trainer, "strategy", None)
    return strategy == NAME or isinstance(strategy, FSDP2Strategy)


StrategyRegistry.register(NAME, FSDP2Strategy, description=FSDP2Strategy.__name__)
