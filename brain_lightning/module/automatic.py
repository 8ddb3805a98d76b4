"""The LightningModule with automatic optimization, in which Lightning steps the optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from brain_lightning.lightning_internals.counters import count_steps
from brain_lightning.optimizers.group import OptimizerGroup
from brain_lightning.protocol import BrainProtocol
from brain_lightning.step import update as updates
from brain_lightning.step.losses import TrainingLoss, training_loss

from .brain_module import BrainModule


class AutomaticModule(BrainModule):
    """Automatic optimization, for a Brain that overrides no method that steps."""

    def __init__(self, brain: BrainProtocol, **kwargs: Any) -> None:
        super().__init__(brain, **kwargs)
        self._batch: Any = None
        self._training_loss: TrainingLoss | None = None
        # Whether the batch failed, so that Lightning's closure must do nothing.
        self._skips = False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Stores the batch, because Lightning passes only a closure to ``optimizer_step``."""
        self._batch = batch

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Runs SpeechBrain's ``fit_batch``; Lightning runs forward, backward and step."""
        assert isinstance(optimizer, LightningOptimizer)
        assert optimizer_closure is not None
        update = _TrainerUpdate(self, optimizer, optimizer_closure)
        batch, self._batch = self._batch, None
        self._fit(batch, batch_idx, update.fit, update.step)
        if update.result is None:
            self._skip(optimizer_closure)
        if not update.is_step:
            count_steps(self.trainer, -1)

    def _skip(self, closure: Callable[[], Any]) -> None:
        """Calls Lightning's closure with a NaN loss, because Lightning requires a loss."""
        self._skips = True
        try:
            closure()
        finally:
            self._skips = False

    def stepping(self, optimizers: Iterable[Optimizer]) -> None:
        """Called before the optimizers step."""
        self.run.run_state.before.copy_weights(optimizers)

    def stepped(self, loss: Tensor, is_step: bool) -> None:
        """Called after the update of a batch."""
        self.run.train.stepped(loss, int(is_step))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Calls ``compute_forward`` and ``compute_objectives`` with Stage.TRAIN."""
        if self._skips:
            return torch.tensor(torch.nan)
        self._training_loss = training_loss(self.brain, batch)
        return self._training_loss.scaled

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Runs the backward pass; a loss that is not finite adds no gradients."""
        if self._skips:
            return
        backward = super().backward
        self.training_loss.backward(lambda: backward(loss, *args, **kwargs))

    @property
    def training_loss(self) -> TrainingLoss:
        """The loss from ``training_step`` in this batch."""
        assert self._training_loss is not None
        return self._training_loss

    def forget_loss(self) -> None:
        """Frees the loss from ``training_step``, and the graph of a batch that failed."""
        self._training_loss = None

    def fit_batch(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Runs SpeechBrain's ``fit_batch`` without Lightning's hooks; see ``BrainModule``."""
        update = updates.DirectUpdate(self.brain, self.stepping, self.stepped)
        loss = self._fit(batch, batch_idx, update.fit, update.step)
        # on_fit_batch_end may step as well.
        self.run.train.steps = int(update.is_step)
        # The loss that training_step would return.
        return {"loss": loss if update.result is None else update.result.scaled.detach()}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as the Brain does: separately for each active optimizer."""
        assert isinstance(optimizer, OptimizerGroup)
        updates.prepare_gradients(self.brain, optimizer.active)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Does nothing, because the Brain zeroes the gradients of optimizers that stepped."""


class _TrainerUpdate(updates.DirectUpdate):
    """An update that uses the Trainer's strategy, precision and callbacks."""

    def __init__(
        self,
        module: AutomaticModule,
        optimizer: LightningOptimizer,
        closure: Callable[[], Any],
    ) -> None:
        super().__init__(module.brain, module.stepping, module.stepped)
        self._module, self._optimizer, self._closure = module, optimizer, closure

    def compute_gradients(self, batch: Any) -> TrainingLoss:
        """Calls Lightning's closure, which calls ``training_step`` and ``backward``."""
        try:
            self._closure()
            self.result = result = self._module.training_loss
        finally:
            self._module.forget_loss()
        return result

    def apply(self, optimizers: Mapping[str, Optimizer]) -> None:
        """Steps the optimizers; Lightning calls ``configure_gradient_clipping`` before."""
        group = self._optimizer.optimizer
        assert isinstance(group, OptimizerGroup)
        group.active = optimizers
        # Lightning's mixed precision would skip the step if the closure returned None.
        self._optimizer.step(closure=lambda: True)
