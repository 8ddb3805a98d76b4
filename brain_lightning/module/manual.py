"""The LightningModule of a Brain that steps its optimizers itself."""

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
    """The steps of the batch in hand.

    Attributes:
        made: How many optimizers have stepped.
        running: Optimizers whose step runs, each as often as torch says so.
    """

    made: int = 0
    running: list[Optimizer] = field(default_factory=list)


class ManualModule(BrainModule):
    """For a Brain that overrides ``fit_batch`` or ``optimizers_step``: manual optimization."""

    def __init__(self, brain: BrainProtocol, **kwargs: Any) -> None:
        super().__init__(brain, **kwargs)
        self.automatic_optimization = False
        self._taken = _Steps()

    def on_train_start(self) -> None:
        """Counts, in this run, the steps of all optimizers, whoever owns them."""
        temporary = self.run.temporary
        temporary.enter_context(register_optimizer_step_pre_hook(self._before_step))
        temporary.enter_context(register_optimizer_step_post_hook(self._after_step))
        temporary.wrap(self.brain, "on_fit_batch_end", self._on_fit_batch_end)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """``fit_batch`` of the Brain; each optimizer step in it moves ``global_step``."""
        loss = self._fit_by_hand(batch, batch_idx)
        count_steps(self.trainer, self.run.train.steps)
        return loss

    def fit_batch(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """``training_step`` without Lightning's hooks: see ``BrainModule``."""
        loss = self._fit_by_hand(batch, batch_idx)
        return {} if loss is None else {"loss": loss}

    def _fit_by_hand(self, batch: Any, batch_idx: int) -> Tensor | None:
        self._taken.made = 0
        self._taken.running.clear()
        loss = self._fit(batch, batch_idx, self._fit_and_count, self._step)
        # A recipe may return anything; callbacks understand a tensor.
        return loss if isinstance(loss, Tensor) else None

    def _fit_and_count(self, batch: Any) -> Any:
        loss = self.brain.fit_batch(batch)
        # Its fit_batch need not call on_fit_batch_end.
        self.run.train.steps = self._steps()
        return loss

    def _step(self) -> None:
        # A fit_batch of the recipe's own decides by itself when to step.
        if calls_ours(self.brain, "fit_batch"):
            self.brain.optimizers_step()

    def _steps(self) -> int:
        return self._taken.made or int(not has_optimizer(self.brain))

    def _on_fit_batch_end(
        self, hook: Callable[..., Any], batch: Any, outputs: Any, loss: Any, should_step: bool
    ) -> Any:
        """Called by the recipe, once its update is made."""
        if self.run.train.is_innermost:
            self.run.train.stepped(loss, self._steps())
        return hook(batch, outputs, loss, should_step)

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        train, running = self.run.train, self._taken.running
        # A recipe may fit another Brain within fit_batch, or step outside of one.
        if not train.is_innermost:
            return
        # torch calls it once more for a subclass whose step calls that of its base.
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
            self._taken.running.remove(optimizer)
            self._taken.made += optimizer not in self._taken.running
