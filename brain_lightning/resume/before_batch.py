"""What fitting a batch changes, as it was before: a run resumes there, or after the batch."""

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
from brain_lightning.optimizers.trained_parts import Switches, switches
from brain_lightning.protocol import BrainProtocol, optimizers_of, parameters_of
from brain_lightning.step.window import Window, window_of

from .epoch_statistics import EpochStatistics
from .plain_values import State
from .process_state import restore_buffers, restore_synchronizes, synchronizes
from .random_state import random_state, set_random_state
from .saved_state import BatchState

logger = logging.getLogger(__name__)

# What a Brain counts in one TRAIN stage, and a validation overwrites.
COUNTS = ("step", "avg_train_loss", "nonfinite_count")
COUNTS_OF_BATCH = (*COUNTS, "optimizer_step")


class BeforeBatch:
    """The state before a batch.

    The counts are always kept. Everything else is copied only where something may save in
    the middle of a batch: gradients, buffers, statistics and random states before it, and
    weights and optimizers before the first step that changes them.

    Args:
        brain: The Brain that trains.

    Attributes:
        is_one_of_several: Whether there are other processes.
        is_whole: Whether everything was copied.
        counts: Of the Brain, by name.
        synchronizes: See ``process_state``.
        window: The weights of the window.
        random: The random state.
        statistics: What hooks had accumulated.
        gradients: By the index of the parameter.
        switches: What was trained.
        steps: Whether an optimizer has begun to step.
        skipped: Batches of the epoch that were undone, for there was no memory for them.
    """

    def __init__(self, brain: BrainProtocol) -> None:
        self._brain = brain
        self.is_one_of_several = False
        self.is_whole = False
        self.counts: State = {}
        self.synchronizes: list[bool] = []
        self.window = Window()
        self.random: State = {}
        self.statistics: State = {}
        self.gradients: dict[int, Tensor] = {}
        self.switches: Switches = {}
        self.steps = False
        self.skipped = 0
        self._epoch_statistics: EpochStatistics | None = None
        self._buffers: dict[int, Tensor] = {}
        self._weights: dict[int, Tensor] = {}
        self._optimizers: dict[str, State] = {}
        self._scaler: State = {}
        self._warned: set[str] = set()

    def count(self) -> None:
        """Keeps the counts before a batch, which cost nothing."""
        self.steps = False
        own = vars(self._brain)
        self.counts = {name: own[name] for name in COUNTS_OF_BATCH}
        self.window = window_of(self._brain)
        if self.is_one_of_several:
            self.synchronizes = synchronizes(self._brain)

    def copy(self, statistics: EpochStatistics) -> None:
        """Copies everything that changes before a step.

        Args:
            statistics: Of the epoch.
        """
        brain = self._brain
        self.is_whole = True
        self.random = random_state()
        self._epoch_statistics, self.statistics = statistics, statistics.copy()
        self.switches = switches(brain)
        self._scaler = brain.scaler.state_dict()
        with self._as_far_as_there_is_memory():
            self.gradients = {i: grad.clone() for i, grad in gradients(brain).items()}
            self._buffers = {i: b.clone() for i, b in enumerate(brain.modules.buffers())}

    def copy_weights(self, optimizers: Iterable[Optimizer]) -> None:
        """Copies what a step changes; called before it.

        Args:
            optimizers: Those that are about to step.
        """
        self.steps = True
        if not self.is_whole:
            return
        names = {id(optimizer): name for name, optimizer in _optimizers(self._brain).items()}
        index = {id(p): i for i, p in enumerate(parameters(self._brain))}
        with self._as_far_as_there_is_memory():
            for optimizer in optimizers:
                name = names.get(id(optimizer))
                if name is not None and name not in self._optimizers:
                    for p in parameters_of(optimizer):
                        self._weights.setdefault(index[id(p)], p.detach().clone())
                    with as_shards():
                        self._optimizers[name] = copy.deepcopy(optimizer.state_dict())

    @contextmanager
    def _as_far_as_there_is_memory(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            self.forget()
            self.warn_once(
                "There is no memory for a copy of what a batch changes: what is saved in the "
                "middle of one cannot be resumed exactly."
            )

    def if_whole(self) -> BeforeBatch | None:
        """Itself where everything was copied; else it warns of what is saved in the batch."""
        if self.is_whole:
            return self
        self.warn_once(
            "A checkpoint is saved in the middle of a batch, where nothing was expected "
            "to save: a run that resumes from it fits this batch again, with what it had "
            "changed already."
        )
        return None

    def warn_once(self, message: str) -> None:
        """Warns once in a run.

        Args:
            message: What of.
        """
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    def forget(self) -> None:
        """Frees the copies, if any, once the batch is over."""
        if not self.is_whole:
            return
        self.is_whole = False
        self.statistics, self.gradients, self._buffers = {}, {}, {}
        self._weights, self._optimizers, self.switches = {}, {}, {}

    def undo(self) -> bool:
        """Restores what there was before the batch, in place.

        Returns:
            Whether it did. Where nothing was copied, the counts are restored, and gradients
            are dropped with those of earlier batches of the window; a step that has begun
            cannot be undone then.
        """
        brain, statistics = self._brain, self._epoch_statistics
        if self.steps and not self.is_whole:
            return False
        for name, value in self.counts.items():
            setattr(brain, name, value)
        restore_synchronizes(brain, self.synchronizes)
        if not self.is_whole:
            self.drop_gradients()
        else:
            brain._lightning.window = self.window
            restore_gradients(brain, self.gradients)
            assert statistics is not None
            undo(brain, self.state())
            statistics.undo(self.statistics)
            set_random_state(self.random)
        return True

    def drop_gradients(self) -> None:
        """Drops those of earlier batches too: the update is left out that they are for."""
        restore_gradients(self._brain, {})
        # Not None: other processes may have gradients to weigh.
        weight = None if self.window.weight is None else 0.0
        self._brain._lightning.window = replace(self.window, weight=weight)

    def state(self) -> BatchState:
        """What to undo when the batch is fitted again."""
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
        brain: The Brain, which has recovered the state in the middle of the batch.
        state: From ``BeforeBatch.state``.
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
    # One that has not scaled has nothing that update could change.
    scaler.scale(torch.zeros((), device=brain.device))
    scaler.load_state_dict(state)
    # It remembers of which optimizers it has unscaled the gradients.
    scaler.update(scaler.get_scale())


def parameters(brain: BrainProtocol) -> list[Parameter]:
    """The parameters of the modules and of the optimizers, each once.

    Args:
        brain: The Brain.
    """
    optimized = map(parameters_of, _optimizers(brain).values())
    return list(dict.fromkeys(chain(brain.modules.parameters(), *optimized)))


def gradients(brain: BrainProtocol) -> dict[int, Tensor]:
    """The gradients that there are, by the index of the parameter.

    Args:
        brain: The Brain.
    """
    return {i: p.grad for i, p in enumerate(parameters(brain)) if p.grad is not None}


def restore_gradients(brain: BrainProtocol, saved: Mapping[int, Tensor]) -> None:
    """Restores gradients, but those of parameters that have another shape now.

    Args:
        brain: The Brain. A recipe may have left out modules of the checkpoint.
        saved: From ``gradients``.
    """
    for index, parameter in enumerate(parameters(brain)):
        gradient = saved.get(index)
        if gradient is not None and gradient.shape != parameter.shape:
            gradient = None
        if gradient is not None and not is_shard(parameter):
            gradient = gradient.to(parameter.device)
        parameter.grad = like(gradient, parameter)


def _optimizers(brain: BrainProtocol) -> dict[str, Optimizer]:
    """Also those that a recipe keeps by itself, and steps itself, by their names in a file."""
    own = {name.removeprefix("self."): each for name, each in optimizers_of(brain)}
    return {**own, **all_optimizers(brain)}


def on_cpu(tensors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Tensors as they are saved; shards, which become whole then, as they are.

    Args:
        tensors: By index.
    """
    return on_host({key: t if is_shard(t) else t.detach() for key, t in tensors.items()})
