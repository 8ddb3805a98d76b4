"""How the LightningModule of a Brain fits a batch: by Lightning, or by its own hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from brain_lightning.lightning_internals.callbacks import callbacks_of
from brain_lightning.lightning_internals.counters import count_steps
from brain_lightning.protocol import BrainProtocol
from brain_lightning.step.optimizers import OptimizerGroup, has_optimizer
from brain_lightning.step.update import (
    DirectUpdate,
    TrainingLoss,
    fit_batch,
    optimizers_step,
    prepare_gradients,
    training_loss,
)

from .brain_module import BrainModule


class AutomaticModule(BrainModule):
    """For a Brain that leaves the stepping alone: Lightning's automatic optimization."""

    def __init__(self, brain: BrainProtocol, **kwargs: Any) -> None:
        super().__init__(brain, **kwargs)
        self._batch: Any = None
        self._training_loss: TrainingLoss | None = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Keeps the batch, for Lightning hands only a closure to ``optimizer_step``."""
        self._batch = batch

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """``fit_batch`` of SpeechBrain, with Lightning doing the passes and the step."""
        brain, before = self.brain, self.brain.optimizer_step
        assert isinstance(optimizer, LightningOptimizer)
        assert optimizer_closure is not None
        update = _TrainerUpdate(self, optimizer, optimizer_closure)
        batch, self._batch = self._batch, None
        last = self._believes_last(batch_idx)
        try:
            self.run.fit(batch, lambda batch: fit_batch(brain, batch, update), last)
        finally:
            self._training_loss = None
        # Where nothing is optimized a batch counts: ModelCheckpoint goes by the steps.
        if brain.optimizer_step == before and has_optimizer(brain):
            count_steps(self.trainer, -1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """``compute_forward`` and ``compute_objectives`` at Stage.TRAIN."""
        self._training_loss = training_loss(self.brain, batch)
        return self._training_loss.scaled

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The backward pass, but for a loss that is not finite."""
        if self.training_loss.finite:
            super().backward(loss, *args, **kwargs)

    @property
    def training_loss(self) -> TrainingLoss:
        """What ``training_step`` found in this batch."""
        assert self._training_loss is not None
        return self._training_loss

    def fit_batch(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """``fit_batch`` of SpeechBrain, where nobody needs Lightning's own steps.

        Args:
            batch: What the loader gave.
            batch_idx: Its number in the epoch, from 0.

        Returns:
            The loss, as Lightning hands it to callbacks.
        """
        brain, before = self.brain, self.brain.optimizer_step
        update = DirectUpdate(brain, self.run.run_state.use_batch)
        last = self._believes_last(batch_idx)
        self.run.fit(batch, lambda batch: fit_batch(brain, batch, update), last)
        if brain.optimizer_step != before or not has_optimizer(brain):
            count_steps(self.trainer, 1)
        # What training_step returns.
        return {} if update.result is None else {"loss": update.result.scaled.detach()}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as the Brain does: each active optimizer on its own."""
        assert isinstance(optimizer, OptimizerGroup)
        prepare_gradients(self.brain, optimizer.active)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Nothing: the Brain zeroes what has stepped."""


class _TrainerUpdate:
    """An update that goes through the Trainer: its strategy, precision and callbacks."""

    def __init__(
        self,
        module: AutomaticModule,
        optimizer: LightningOptimizer,
        closure: Callable[[], Any],
    ) -> None:
        self._module = module
        self._optimizer = optimizer
        self._closure = closure

    def compute_gradients(self, batch: Any) -> TrainingLoss:
        """Lightning's closure: ``training_step``, then the backward pass."""
        self._closure()
        self._module.run.run_state.use_batch()
        return self._module.training_loss

    def step(self) -> None:
        """One step of the group, in Lightning's order of hooks."""
        optimizers_step(self._module.brain, self._apply)

    def _apply(self, optimizers: Mapping[str, Optimizer]) -> None:
        group = self._optimizer.optimizer
        assert isinstance(group, OptimizerGroup)
        group.active = optimizers
        self._optimizer.step(closure=_no_closure)


def _no_closure() -> bool:
    # Not None: Lightning's mixed precision takes that for "skip this step".
    return True


class ManualModule(BrainModule):
    """For a Brain with its own ``fit_batch`` or ``optimizers_step``: it runs as it is."""

    def __init__(self, brain: BrainProtocol, **kwargs: Any) -> None:
        super().__init__(brain, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """``fit_batch`` of the Brain; each optimizer step in it moves ``global_step``."""
        with self._watched_steps() as steps:
            last = self._believes_last(batch_idx)
            loss = self.run.fit(batch, self.brain.fit_batch, last)
        count_steps(self.trainer, len(steps) if has_optimizer(self.brain) else 1)
        # A recipe may return anything; callbacks understand a tensor.
        return loss if isinstance(loss, Tensor) else None

    def fit_batch(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """The same, where nobody needs Lightning's own steps.

        Args:
            batch: What the loader gave.
            batch_idx: Its number in the epoch, from 0.

        Returns:
            The loss, as Lightning hands it to callbacks.
        """
        loss = self.training_step(batch, batch_idx)
        return {} if loss is None else {"loss": loss}

    @contextmanager
    def _watched_steps(self) -> Iterator[list[Optimizer]]:
        """Gathers the optimizers that step within, whoever owns them."""
        stepped: list[Optimizer] = []
        with ExitStack() as stack:
            before = register_optimizer_step_pre_hook(self._before_step)
            after = register_optimizer_step_post_hook(
                lambda optimizer, *_: self._after_step(optimizer, stepped)
            )
            stack.callback(before.remove)
            stack.callback(after.remove)
            yield stepped

    def _after_step(self, optimizer: Optimizer, stepped: list[Optimizer]) -> None:
        if self._is_mine():
            stepped.append(optimizer)
            self.run.run_state.use_batch()

    def _is_mine(self) -> bool:
        # A recipe may fit another Brain within fit_batch.
        return self.run.is_innermost

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._is_mine():
            trainer = self.trainer
            for callback in callbacks_of(trainer):
                callback.on_before_optimizer_step(trainer, self, optimizer)
            self.on_before_optimizer_step(optimizer)
