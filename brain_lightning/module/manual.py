"""The LightningModule with manual optimization, in which the Brain steps its optimizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from brain_lightning.compat.speechbrain import calls_ours
from brain_lightning.lightning_internals.counters import count_steps
from brain_lightning.lightning_internals.trainer_callbacks import callbacks_of
from brain_lightning.optimizers.active import has_optimizer
from brain_lightning.phase import Phase
from brain_lightning.protocol import BrainProtocol

from .brain_module import BrainModule


@dataclass
class _Steps:
    """The optimizer steps of the current batch.

    Attributes:
        count: Number of optimizer steps.
        running: Optimizers in ``step``, once for each pre-hook call of torch.
    """

    count: int = 0
    running: list[Optimizer] = field(default_factory=list)


class ManualModule(BrainModule):
    """Manual optimization, for a Brain that overrides ``fit_batch`` or ``optimizers_step``."""

    def __init__(self, brain: BrainProtocol, **kwargs: Any) -> None:
        super().__init__(brain, **kwargs)
        self.automatic_optimization = False
        self._optimizer_steps = _Steps()

    def on_train_start(self) -> None:
        """Counts the steps of all optimizers during this run."""
        temporary = self.run.temporary
        temporary.enter_context(register_optimizer_step_pre_hook(self._before_step))
        temporary.enter_context(register_optimizer_step_post_hook(self._after_step))
        temporary.wrap(self.brain, "on_fit_batch_end", self._on_fit_batch_end)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Calls ``fit_batch`` of the Brain; each optimizer step increments ``global_step``."""
        loss = self._fit_by_hand(batch, batch_idx)
        count_steps(self.trainer, self.run.train.steps)
        return loss

    def fit_batch(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Runs ``training_step`` without Lightning's hooks; see ``BrainModule``."""
        loss = self._fit_by_hand(batch, batch_idx)
        return {} if loss is None else {"loss": loss}

    def _fit_by_hand(self, batch: Any, batch_idx: int) -> Tensor | None:
        self._optimizer_steps.count = 0
        self._optimizer_steps.running.clear()
        loss = self._fit(batch, batch_idx, self._fit_and_count, self._step)
        # A recipe may return any type, but callbacks expect a tensor.
        return loss if isinstance(loss, Tensor) else None

    def _fit_and_count(self, batch: Any) -> Any:
        loss = self.brain.fit_batch(batch)
        # An overridden fit_batch may not call on_fit_batch_end.
        self.run.train.steps = self._steps()
        return loss

    def _step(self) -> None:
        # An overridden fit_batch decides when to step.
        if calls_ours(self.brain, "fit_batch"):
            self.brain.optimizers_step()

    def _steps(self) -> int:
        return self._optimizer_steps.count or int(not has_optimizer(self.brain))

    def _on_fit_batch_end(
        self, hook: Callable[..., Any], batch: Any, outputs: Any, loss: Any, should_step: bool
    ) -> Any:
        """Called by the recipe, after its update."""
        if self.run.train.is_innermost:
            self.run.train.stepped(loss, self._steps())
        return hook(batch, outputs, loss, should_step)

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        train, running = self.run.train, self._optimizer_steps.running
        # A recipe may fit another Brain within fit_batch, or step outside of fit_batch.
        if not train.is_innermost:
            return
        # torch calls the hook twice if the step of a subclass calls the step of its base.
        again = optimizer in running
        running.append(optimizer)
        if again:
            return
        trainer, state = self.trainer, self.run.run_state
        state.phase = Phase.FITTING
        state.before.copy_weights([optimizer])
        for callback in callbacks_of(trainer):
            callback.on_before_optimizer_step(trainer, self, optimizer)
        self.on_before_optimizer_step(optimizer)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self.run.train.is_innermost:
            self._optimizer_steps.running.remove(optimizer)
            self._optimizer_steps.count += optimizer not in self._optimizer_steps.running
