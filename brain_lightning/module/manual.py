"""The LightningModule of a Brain that steps its optimizers itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from brain_lightning.lightning_internals.callbacks import callbacks_of
from brain_lightning.lightning_internals.counters import count_steps
from brain_lightning.protocol import BrainProtocol
from brain_lightning.step.optimizers import has_optimizer

from .brain_module import BrainModule


class ManualModule(BrainModule):
    """For a Brain that overrides ``fit_batch`` or ``optimizers_step``: manual optimization."""

    def __init__(self, brain: BrainProtocol, **kwargs: Any) -> None:
        super().__init__(brain, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """``fit_batch`` of the Brain; each optimizer step in it moves ``global_step``."""
        with self._recorded_steps() as steps:
            last = self._is_expected_last(batch_idx)
            loss = self.run.train.fit(batch, self.brain.fit_batch, last)
        count_steps(self.trainer, len(steps) if has_optimizer(self.brain) else 1)
        # A recipe may return anything; callbacks understand a tensor.
        return loss if isinstance(loss, Tensor) else None

    def fit_batch(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """``training_step`` without Lightning's hooks: see ``BrainModule``."""
        loss = self.training_step(batch, batch_idx)
        return {} if loss is None else {"loss": loss}

    @contextmanager
    def _recorded_steps(self) -> Iterator[list[Optimizer]]:
        """Records the optimizers that step within, whoever owns them."""
        stepped: list[Optimizer] = []
        before = register_optimizer_step_pre_hook(self._before_step)
        after = register_optimizer_step_post_hook(
            lambda optimizer, *_: self._after_step(optimizer, stepped)
        )
        with before, after:
            yield stepped

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        # A recipe may fit another Brain within fit_batch.
        if self.run.train.is_innermost:
            trainer = self.trainer
            for callback in callbacks_of(trainer):
                callback.on_before_optimizer_step(trainer, self, optimizer)
            self.on_before_optimizer_step(optimizer)

    def _after_step(self, optimizer: Optimizer, stepped: list[Optimizer]) -> None:
        if self.run.train.is_innermost:
            stepped.append(optimizer)
            self.run.run_state.use_batch()
