"""The strategy that shards a Brain's modules, for a Trainer."""

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
# How processes communicate about shards on the CPU and weights on GPUs.
OF_EACH_DEVICE = "cpu:gloo,cuda:nccl"


class FSDP2Strategy(DDPStrategy):
    """Trains a Brain whose weights, gradients and optimizer states are shared out.

    Each process holds a part of them, and gathers the weights of an entry of ``modules``, or
    of a block of it, while it computes (``torch.distributed.fsdp.fully_shard``). Processes,
    samplers and checkpoints are those of ``strategy="ddp"``, and so is what is learned.
    ``Trainer(strategy="fsdp2")`` is this with its defaults.

    Args:
        blocks: Names of classes whose instances are gathered one by one, rather than the
            whole entry at once. By default these are layers of a million parameters and more
            in a ``ModuleList``; ``[]`` for none.
        methods: Names of methods, besides ``forward``, that the recipe calls on an entry or a
            block and that use its weights; the usual ones are known (``methods.METHODS``).
        gather_to_evaluate: Whether each process gathers all weights for VALID and TEST, where
            it may evaluate other batches than the others. ``False`` for a model that does not
            fit: processes then evaluate as many batches each, by the same calls.
        cpu_offload: Keeps shards in memory of the CPU, where the optimizer steps as well. On
            the CPU they are there anyway.
        replicate: Copies of the model (HSDP): each is shared out over as many processes as
            there are, divided by this.
        sharded_checkpoints: Lets each process write its own shards to a ``CKPT+`` directory,
            instead of whole tensors by the first one.
        **kwargs: Of Lightning's ``DDPStrategy``, but for those that are for
            ``DistributedDataParallel``.

    Raises:
        UnsupportedError: A value makes no sense.
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
        """Lightning's, which gets the module of a run.

        Args:
            model: The module.

        Raises:
            UnsupportedError: It is not of a Brain: nothing would be sharded.
        """
        if not hasattr(model, "brain"):
            raise UnsupportedError(
                f"strategy='fsdp2' shards modules of a Brain, and {type(model).__name__} is "
                "of none: give the Trainer to_lightning(brain), or another strategy"
            )
        super().connect(model)

    def setup(self, trainer: Trainer) -> None:
        """Lightning's, which moves what was recovered of optimizers to the device.

        Args:
            trainer: The Trainer.
        """
        super().setup(trainer)
        if self.sharding.cpu_offload:
            for optimizer in self.optimizers:
                move_to_parameters(optimizer)

    def model_to_device(self) -> None:
        """Nothing: an entry of ``modules`` is moved and sharded before the next one is."""

    def configure_ddp(self) -> None:
        """Nothing: each entry of ``modules`` is sharded by itself, after it is compiled."""


def move_to_parameters(optimizer: Optimizer) -> None:
    """Moves the state of an optimizer to where its parameters are.

    Args:
        optimizer: Has all of its parameters.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            # Where a step is counted says the optimizer.
            if isinstance(value, Tensor) and key != "step":
                state[key] = value.to(parameter.device)


def shards(trainer: Any) -> bool:
    """Whether a Trainer, or arguments for one, say that modules are sharded.

    Args:
        trainer: One of both.
    """
    is_mapping = isinstance(trainer, Mapping)
    strategy = trainer.get("strategy") if is_mapping else getattr(trainer, "strategy", None)
    return strategy == NAME or isinstance(strategy, FSDP2Strategy)


StrategyRegistry.register(NAME, FSDP2Strategy, description=FSDP2Strategy.__name__)
