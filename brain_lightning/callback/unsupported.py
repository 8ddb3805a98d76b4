"""Lightning's callbacks that cannot do their work with a Brain, or only in part."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.modules.batchnorm import _BatchNorm

from brain_lightning.compat.versions import AVERAGES_WITHOUT_END
from brain_lightning.errors import UnsupportedError
from brain_lightning.lightning_internals.trainer_callbacks import callbacks_of
from brain_lightning.protocol import BrainProtocol

# Those that cannot at all, and why.
REFUSED_CALLBACKS: dict[type[Callback], str] = {
    LearningRateFinder: "it sets an attribute that no recipe reads, after a trial run that "
    "would move the epoch counter; try learning rates with overrides, --lr=0.01",
    BatchSizeFinder: "its trial runs would move the epoch counter and the checkpointer; "
    "give batch_size in train_loader_kwargs",
}


def check_callbacks(trainer: Trainer, brain: BrainProtocol) -> None:
    """Refuses the callbacks of a Trainer that cannot do their work with this Brain.

    Args:
        trainer: The Trainer, before it runs.
        brain: The Brain that is going to run.

    Raises:
        UnsupportedError: There is one; it is named, with the reason.
    """
    for callback in callbacks_of(trainer):
        for cls, reason in REFUSED_CALLBACKS.items():
            if isinstance(callback, cls):
                raise UnsupportedError(f"{cls.__name__} does not work with a Brain: {reason}")
        if isinstance(callback, StochasticWeightAveraging):
            _check_averaging(trainer, brain)


def _check_averaging(trainer: Trainer, brain: BrainProtocol) -> None:
    if any(isinstance(module, _BatchNorm) for module in brain.modules.modules()):
        raise UnsupportedError(
            "StochasticWeightAveraging adds an epoch for BatchNorm, which an epoch counter "
            "does not have: use WeightAveraging(use_buffers=True) or EMAWeightAveraging"
        )
    if trainer.max_epochs == -1 and not AVERAGES_WITHOUT_END:
        raise UnsupportedError(
            "StochasticWeightAveraging takes its average in the last of max_epochs, before "
            "Lightning 2.6.1, and there is none: give max_epochs as many as the epoch counter"
        )


def warn_of_unused_average(trainer: Trainer) -> None:
    """Warns where an average of weights was made for nothing.

    Args:
        trainer: The Trainer at the end of a training.
    """
    averaging = any(isinstance(c, StochasticWeightAveraging) for c in callbacks_of(trainer))
    if averaging and trainer.current_epoch < (trainer.max_epochs or 0):
        rank_zero_warn(
            f"StochasticWeightAveraging waited for epoch {trainer.max_epochs}, but the run "
            f"ended after {trainer.current_epoch}: the weights are those of the last update. "
            "Give Trainer(max_epochs=-1), and the average is taken whenever the run ends"
        )
