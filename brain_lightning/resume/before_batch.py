"""Copies of the state that a batch changes, to undo an unfinished batch."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from brain_lightning.fsdp2.state_dict import as_shards
from brain_lightning.fsdp2.tensors import is_shard, like
from brain_lightning.host_copy import on_host
from brain_lightning.optimizers.active import all_optimizers
from brain_lightning.optimizers.module_attributes import (
    Attributes,
    module_attributes,
    restore_module_attributes,
)
from brain_lightning.protocol import BrainProtocol, optimizers_of, parameters_of
from brain_lightning.step.window import Window, window_of

from .epoch_statistics import EpochStatistics
from .plain_values import State
from .process_state import restore_buffers, restore_synchronizes, synchronizes
from .random_state import random_state, set_random_state
from .saved_state import BatchState

logger = logging.getLogger(__name__)

# Attributes that a Brain counts in one TRAIN stage. A validation overwrites them.
COUNTS = ("step", "avg_train_loss", "nonfinite_count")
COUNTS_OF_BATCH = (*COUNTS, "optimizer_step")


class BeforeBatch:
    """The state before a batch.

    The counts are always copied. Everything else is copied only if something may save in the
    middle of a batch. Gradients, buffers, statistics and random states are copied before the
    batch, weights and optimizers before the first optimizer step that changes them.

    Args:
        brain: The Brain that trains.

    Attributes:
        is_distributed: Whether there are several ranks.
        is_complete: Whether everything was copied, and not only the counts.
        counts: Counts of the Brain by name.
        synchronizes: See ``process_state.synchronizes``.
        window: Weights of the accumulation window.
        random: Random state.
        statistics: Statistics that hooks have accumulated.
        gradients: Gradients by the index of the parameter.
        attributes: Attributes of modules, such as which parameters were trained.
        steps: Whether an optimizer has begun its step.
        skipped: Number of batches of the epoch that were undone after running out of memory.
    """

    def __init__(self, brain: BrainProtocol) -> None:
        self._brain = brain
        self.is_distributed = False
        self.is_complete = False
        self.counts: State = {}
        self.synchronizes: list[bool] = []
        self.window = Window()
        self.random: State = {}
        self.statistics: State = {}
        self.gradients: dict[int, Tensor] = {}
        self.attributes: Attributes = {}
        self.steps = False
        self.skipped = 0
        self._epoch_statistics: EpochStatistics | None = None
        self._buffers: dict[int, Tensor] = {}
        self._weights: dict[int, Tensor] = {}
        self._optimizers: dict[str, State] = {}
        self._scaler: State = {}
        self._warned: set[str] = set()

    def count(self) -> None:
        """Copies the counts before a batch, which is cheap."""
        self.steps = False
        own = vars(self._brain)
        self.counts = {name: own[name] for name in COUNTS_OF_BATCH}
        self.window = window_of(self._brain)
        if self.is_distributed:
            self.synchronizes = synchronizes(self._brain)

    def copy(self, statistics: EpochStatistics) -> None:
        """Copies everything that changes before an optimizer step.

        Args:
            statistics: Statistics of the epoch.
        """
        brain = self._brain
        self.is_complete = True
        self.random = random_state()
        self._epoch_statistics, self.statistics = statistics, statistics.copy()
        self.attributes = module_attributes(brain)
        self._scaler = brain.scaler.state_dict()
        with self._forget_if_out_of_memory():
            self.gradients = {i: grad.clone() for i, grad in gradients(brain).items()}
            self._buffers = {i: b.clone() for i, b in enumerate(brain.modules.buffers())}

    def copy_weights(self, optimizers: Iterable[Optimizer]) -> None:
        """Copies weights and optimizer states. Called before an optimizer step.

        Args:
            optimizers: Optimizers that are about to step.
        """
        self.steps = True
        if not self.is_complete:
            return
        names = {id(optimizer): name for name, optimizer in _optimizers(self._brain).items()}
        index = {id(p): i for i, p in enumerate(parameters(self._brain))}
        with self._forget_if_out_of_memory():
            for optimizer in optimizers:
                name = names.get(id(optimizer))
                if name is not None and name not in self._optimizers:
                    for p in parameters_of(optimizer):
                        self._weights.setdefault(index[id(p)], p.detach().clone())
                    with as_shards():
                        self._optimizers[name] = copy.deepcopy(optimizer.state_dict())

    @contextmanager
    def _forget_if_out_of_memory(self) -> Iterator[None]:
        """Frees all copies and warns if a copy runs out of memory."""
        try:
            yield
        except torch.OutOfMemoryError:
            self.forget()
            self.warn_once(
                "Out of memory for a copy of the state before a batch. A checkpoint that is "
                "saved in the middle of a batch cannot be resumed exactly."
            )

    def complete_or_none(self) -> BeforeBatch | None:
        """Returns itself if everything was copied. Else warns about the save, returns None."""
        if self.is_complete:
            return self
        self.warn_once(
            "A checkpoint is saved in the middle of a batch, where no save was expected. A "
            "run that resumes from it fits this batch again, on top of the changes that the "
            "batch has already made."
        )
        return None

    def warn_once(self, message: str) -> None:
        """Logs a warning once per run.

        Args:
            message: The warning.
        """
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    def forget(self) -> None:
        """Frees the copies. Called when the batch is over."""
        if not self.is_complete:
            return
        self.is_complete = False
        self.statistics, self.gradients, self._buffers = {}, {}, {}
        self._weights, self._optimizers, self.attributes = {}, {}, {}

    def undo(self) -> bool:
        """Restores the state before the batch, in place.

        If only the counts were copied, it restores the counts and drops the gradients,
        including the gradients of earlier batches of the accumulation window.

        Returns:
            Whether the batch was undone. It is False if only the counts were copied and an
            optimizer has begun its step.
        """
        brain, statistics = self._brain, self._epoch_statistics
        if self.steps and not self.is_complete:
            return False
        for name, value in self.counts.items():
            setattr(brain, name, value)
        restore_synchronizes(brain, self.synchronizes)
        if not self.is_complete:
            self.drop_gradients()
        else:
            brain._lightning.window = self.window
            restore_gradients(brain, self.gradients)
            assert statistics is not None
            undo(brain, self.state())
            restore_module_attributes(brain, self.attributes)
            statistics.undo(self.statistics)
            set_random_state(self.random)
        return True

    def drop_gradients(self) -> None:
        """Drops all gradients of the window, so that the window makes no update."""
        restore_gradients(self._brain, {})
        # Not None, because other ranks may have gradients to weigh.
        weight = None if self.window.weight is None else 0.0
        self._brain._lightning.window = replace(self.window, weight=weight)

    def state(self) -> BatchState:
        """Returns the state that ``undo`` restores when the batch is fitted again."""
        return {
            "weights": on_cpu(self._weights),
            "buffers": on_cpu(self._buffers),
            "optimizers": self._optimizers,
            "scaler": self._scaler,
            "optimizer_step": self.counts["optimizer_step"],
        }


def undo(brain: BrainProtocol, state: BatchState) -> None:
    """Restores the state before a batch.

    Args:
        brain: The Brain, after it has recovered the state in the middle of the batch.
        state: Result of ``BeforeBatch.state``.
    """
    weights = parameters(brain)
    with torch.no_grad():
        for index, value in state["weights"].items():
            if weights[index].shape == value.shape:
                weights[index].copy_(like(value, weights[index]))
    restore_buffers(brain, state["buffers"])
    optimizers = _optimizers(brain)
    for name, saved_optimizer in state["optimizers"].items():
        optimizers[name].load_state_dict(saved_optimizer)
    if state["scaler"]:
        _restore_scaler(brain, state["scaler"])
    brain.optimizer_step = state["optimizer_step"]


def _restore_scaler(brain: BrainProtocol, state: State) -> None:
    scaler = brain.scaler
    # A scaler creates its tensors in its first call of scale; update() needs them.
    scaler.scale(torch.zeros((), device=brain.device))
    scaler.load_state_dict(state)
    # The scaler records whose gradients it has unscaled. update() clears this record.
    scaler.update(scaler.get_scale())


def parameters(brain: BrainProtocol) -> list[Parameter]:
    """Returns the parameters of the modules and of the optimizers, without duplicates.

    Args:
        brain: The Brain.
    """
    optimized = map(parameters_of, _optimizers(brain).values())
    return list(dict.fromkeys(chain(brain.modules.parameters(), *optimized)))


def gradients(brain: BrainProtocol) -> dict[int, Tensor]:
    """Returns the gradients that are not None, by the index of the parameter.

    Args:
        brain: The Brain.
    """
    return {i: p.grad for i, p in enumerate(parameters(brain)) if p.grad is not None}


def restore_gradients(brain: BrainProtocol, saved: Mapping[int, Tensor]) -> None:
    """Restores gradients, except for parameters whose shape has changed.

    Args:
        brain: The Brain. The recipe may not have loaded all modules of the checkpoint.
        saved: Result of ``gradients``.
    """
    for index, parameter in enumerate(parameters(brain)):
        gradient = saved.get(index)
        if gradient is not None and gradient.shape != parameter.shape:
            gradient = None
        if gradient is not None and not is_shard(parameter):
            gradient = gradient.to(parameter.device)
        parameter.grad = like(gradient, parameter)


def _optimizers(brain: BrainProtocol) -> dict[str, Optimizer]:
    """Returns all optimizers by name, also those that the recipe itself keeps and steps."""
    own = {name.removeprefix("self."): each for name, each in optimizers_of(brain)}
    return {**own, **all_optimizers(brain)}


def on_cpu(tensors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Returns detached tensors on the CPU. Shards stay, because the save gathers them.

    Args:
        tensors: Tensors by index.
    """
    return on_host({key: t if is_shard(t) else t.detach() for key, t in tensors.items()})
