"""The LightningModule of a Brain that steps its optimizers itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from brain_lightning.lightning_internals.counters import count_steps
from brain_lightning.lightning_internals.trainer_callbacks import callbacks_of
from brain_lightning.phase import Phase
from brain_lightning.protocol import BrainProtocol
from brain_lightning.step.optimizers import has_optimizer
from brain_lightning.temporary import TemporaryAttributes

from .brain_module import BrainModule


class ManualModule(BrainModule):
    """For a Brain that overrides ``fit_batch`` or ``optimizers_step``: manual optimization."""

    def __init__(self, brain: BrainProtocol, **kwargs: Any) -> None:
        super().__init__(brain, **kwargs)
        self.automatic_optimization = False
        self._optimizer_steps = 0
        self._stepping: list[Optimizer] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """``fit_batch`` of the Brain; each optimizer step in it moves ``global_step``."""
        self._optimizer_steps, self._stepping = 0, []
        # Of every optimizer that steps within, whoever owns it.
        before = register_optimizer_step_pre_hook(self._before_step)
        after = register_optimizer_step_post_hook(self._after_step)
        with before, after, TemporaryAttributes() as temporary:
            hook = partial(self._on_fit_batch_end, self.brain.on_fit_batch_end)
            temporary.override(self.brain, "on_fit_batch_end", hook)
            loss = self._fit(batch, batch_idx, self._fit_and_count)
        count_steps(self.trainer, self.run.train.steps)
        # A recipe may return anything; callbacks understand a tensor.
        return loss if isinstance(loss, Tensor) else None

    def fit_batch(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """``training_step`` without Lightning's hooks: see ``BrainModule``."""
        loss = self.training_step(batch, batch_idx)
        return {} if loss is None else {"loss": loss}

    def _fit_and_count(self, batch: Any) -> Any:
        loss = self.brain.fit_batch(batch)
        # Its fit_batch need not call on_fit_batch_end.
        self.run.train.steps = self._steps()
        return loss

    def _steps(self) -> int:
        return self._optimizer_steps if has_optimizer(self.brain) else 1

    def _on_fit_batch_end(
        self, hook: Callable[..., Any], batch: Any, outputs: Any, loss: Any, should_step: bool
    ) -> Any:
        """Called by the recipe, once its update is made."""
        if self.run.train.is_innermost:
            self.run.train.stepped(loss, self._steps())
        return hook(batch, outputs, loss, should_step)

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        # torch calls it once more for a subclass whose step calls that of its base.
        again = optimizer in self._stepping
        self._stepping.append(optimizer)
        # A recipe may fit another Brain within fit_batch.
        if again or not self.run.train.is_innermost:
            return
        trainer, state = self.trainer, self.run.run_state
        state.phase = Phase.FITTING
        state.before.copy_weights([optimizer])
        for callback in callbacks_of(trainer):
            callback.on_before_optimizer_step(trainer, self, optimizer)
        self.on_before_optimizer_step(optimizer)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._stepping.remove(optimizer)
        if optimizer not in self._stepping and self.run.train.is_innermost:
            self._optimizer_steps += 1
