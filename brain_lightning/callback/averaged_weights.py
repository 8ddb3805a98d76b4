"""The average that ``StochasticWeightAveraging`` puts in place of the weights, at the end.

Lightning measures the statistics of BatchNorm for it in an epoch more, which an epoch counter
does not have. Here they are measured when the training is over, in a pass over the training
data. Where the training ended before there was an average, the weights stay.
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
    """Lets each StochasticWeightAveraging of a Trainer end the training of a Brain.

    Args:
        trainer: The Trainer in its ``setup``.
        run: The run.
        temporary: Records what is changed on the callbacks.
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
    if reason := _why_not_taken(callback, trainer):
        rank_zero_warn(f"{reason}: the weights are those of the last update")
        return
    on_train_end(trainer, module)
    batches = run.run_state.position.fitted
    if batches:
        _measure_batch_norm(trainer, run, batches)


def _why_not_taken(callback: StochasticWeightAveraging, trainer: Trainer) -> str:
    epochs, end = trainer.current_epoch, trainer.max_epochs or 0
    ended = f"but the run ended after {epochs}"
    if callback.n_averaged is None:
        return f"StochasticWeightAveraging starts in epoch {callback.swa_start + 1}, {ended}"
    if epochs < end:
        return (
            f"StochasticWeightAveraging waited for epoch {end}, {ended}. Give "
            "Trainer(max_epochs=-1), and the average is taken whenever the run ends"
        )
    return ""


def _measure_batch_norm(trainer: Trainer, run: Run, batches: int) -> None:
    """Takes as many batches as the last epoch had: a loader may never end."""
    forward = _Forward(run.brain)
    # It is put back in the mode that it says it is in.
    forward.training = run.brain.modules.training
    data = itertools.islice(run.train.loader.loader, batches)
    update_bn(_moved(data, trainer), forward)


def _moved(data: Iterator[Any], trainer: Trainer) -> Iterator[list[Any]]:
    # In a list: what is one already would be replaced by its first item.
    return ([trainer.strategy.batch_to_device(batch)] for batch in data)


class _Forward(nn.Module):
    """The forward pass of a Brain in training, as a module whose parts are the Brain's."""

    def __init__(self, brain: BrainProtocol) -> None:
        super().__init__()
        self._brain = brain
        self.parts = brain.modules

    def forward(self, batch: Any) -> Any:
        """``compute_forward`` at Stage.TRAIN."""
        with self._brain.training_ctx:
            stage = self._brain._lightning.stage_type.TRAIN
            return self._brain.compute_forward(batch, stage)
