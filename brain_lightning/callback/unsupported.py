"""Lightning's callbacks that cannot do their work with a Brain, or only in part."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from torch.optim import Optimizer

from brain_lightning.compat.versions import AVERAGES_WITHOUT_END
from brain_lightning.errors import UnsupportedError
from brain_lightning.lightning_internals.trainer_callbacks import callbacks_of
from brain_lightning.protocol import BrainProtocol
from brain_lightning.step.optimizers import parameters_of

# Those that cannot at all, and why.
REFUSED_CALLBACKS: dict[type[Callback], str] = {
    LearningRateFinder: "it sets an attribute that no recipe reads, after a trial run that "
    "would move the epoch counter; try learning rates with overrides, --lr=0.01",
    BatchSizeFinder: "its trial runs would move the epoch counter and the checkpointer; "
    "give batch_size in train_loader_kwargs",
}


def check_callbacks(trainer: Trainer) -> None:
    """Refuses the callbacks of a Trainer that cannot do their work with a Brain.

    Args:
        trainer: The Trainer, before it runs.

    Raises:
        UnsupportedError: There is one; it is named, with the reason.
    """
    for callback in callbacks_of(trainer):
        for cls, reason in REFUSED_CALLBACKS.items():
            if isinstance(callback, cls):
                raise UnsupportedError(f"{cls.__name__} does not work with a Brain: {reason}")
        if isinstance(callback, StochasticWeightAveraging):
            _check_averaging(trainer)


def _check_averaging(trainer: Trainer) -> None:
    if trainer.max_epochs == -1 and not AVERAGES_WITHOUT_END:
        raise UnsupportedError(
            "StochasticWeightAveraging takes its average in the last of max_epochs, before "
            "Lightning 2.6.1, and there is none: give max_epochs as many as the epoch counter"
        )


def check_backbone(trainer: Trainer, brain: BrainProtocol, optimizer: Optimizer) -> None:
    """Refuses to unfreeze a backbone that the optimizer has already.

    BackboneFinetuning would skip its parameters with a warning, and then set the
    learning rate of the last group, which is another one.

    Args:
        trainer: The Trainer.
        brain: The Brain after ``init_optimizers``.
        optimizer: Its optimizers.

    Raises:
        UnsupportedError: The backbone is in the optimizer.
    """
    if not any(isinstance(callback, BackboneFinetuning) for callback in callbacks_of(trainer)):
        return
    optimized = {id(p) for p in parameters_of(optimizer)}
    backbone = brain.modules["backbone"].parameters() if "backbone" in brain.modules else ()
    if any(id(p) in optimized for p in backbone):
        raise UnsupportedError(
            "BackboneFinetuning gives the optimizer the backbone's parameters itself, once it "
            "unfreezes them: override init_optimizers and leave them out"
        )
