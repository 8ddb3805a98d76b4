"""The end of ``StochasticWeightAveraging``, when the average replaces the weights.

Lightning computes the BatchNorm statistics of the average in an additional epoch, for which an
epoch counter has no number. Here a pass over the training data computes them after training.
If training ends before there is an average, the weights are not changed.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim.swa_utils import update_bn

from brain_lightning.lightning_internals.trainer_callbacks import callbacks_of
from brain_lightning.protocol import BrainProtocol
from brain_lightning.stages.run import Run
from brain_lightning.temporary import TemporaryAttributes

logger = logging.getLogger(__name__)


def average_at_end(trainer: Trainer, run: Run, temporary: TemporaryAttributes) -> None:
    """Makes each StochasticWeightAveraging of a Trainer apply its average after training.

    Args:
        trainer: The Trainer in its ``setup``.
        run: The run.
        temporary: Records the changes to the callbacks.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, StochasticWeightAveraging):
            temporary.override(callback, "pl_module_contains_batch_norm", lambda _: False)
            end = partial(_end, callback, run)
            temporary.wrap(callback, "on_train_end", end)


def _end(
    callback: StochasticWeightAveraging,
    run: Run,
    on_train_end: Any,
    trainer: Trainer,
    module: LightningModule,
) -> None:
    if reason := _why_no_average(callback, trainer):
        rank_zero_warn(f"The average of the weights is not used. {reason}.")
        return
    on_train_end(trainer, module)
    batches = run.run_state.position.fitted
    if batches:
        _measure_batch_norm(trainer, run, batches)


def _why_no_average(callback: StochasticWeightAveraging, trainer: Trainer) -> str:
    epochs, end = trainer.current_epoch, trainer.max_epochs or 0
    ended = f"but the run ended after epoch {epochs}"
    if callback.n_averaged is None:
        return f"StochasticWeightAveraging starts in epoch {callback.swa_start + 1}, {ended}"
    if epochs < end:
        return (
            f"StochasticWeightAveraging ends in epoch {end}, {ended}. Use "
            "Trainer(max_epochs=-1) to use the average in the epoch in which the run ends"
        )
    return ""


def _measure_batch_norm(trainer: Trainer, run: Run, batches: int) -> None:
    """Updates the BatchNorm statistics, on as many batches as the last epoch had."""
    forward = _Forward(run.brain)
    # update_bn restores this mode.
    forward.training = run.brain.modules.training
    data = itertools.islice(run.train.loader.loader, batches)
    update_bn(_moved(data, trainer), forward)


def _moved(data: Iterator[Any], trainer: Trainer) -> Iterator[list[Any]]:
    # update_bn passes the first item of a list to the module.
    return ([trainer.strategy.batch_to_device(batch)] for batch in data)


class _Forward(nn.Module):
    """A module with the Brain's modules, whose forward pass is ``compute_forward``."""

    def __init__(self, brain: BrainProtocol) -> None:
        super().__init__()
        self._brain = brain
        self.parts = brain.modules

    def forward(self, batch: Any) -> Any:
        """Calls ``compute_forward`` with Stage.TRAIN."""
        with self._brain.training_ctx:
            stage = self._brain._lightning.stage_type.TRAIN
            return self._brain.compute_forward(batch, stage)
