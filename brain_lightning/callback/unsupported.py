"""Raises for Lightning's callbacks that do not work with a Brain in some settings."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging

from brain_lightning.compat.versions import AVERAGES_WITHOUT_END
from brain_lightning.errors import UnsupportedError
from brain_lightning.fsdp2.strategy import FSDP2Strategy
from brain_lightning.lightning_internals.trainer_callbacks import callbacks_of

# Callbacks that do not work with sharded modules, and the reasons. (By name, because
# WeightAveraging and EMAWeightAveraging are new in Lightning 2.6.)
COPIES = "it copies modules, and sharded modules cannot be copied"
UNSUPPORTED_WITH_SHARDS = {
    "WeightAveraging": COPIES,
    "StochasticWeightAveraging": COPIES,
    "ModelPruning": "it needs the smallest of all weights, and each rank has only its shards",
}


def check_callbacks(trainer: Trainer) -> None:
    """Raises if a callback of a Trainer does not work with a Brain.

    Args:
        trainer: The Trainer, before it runs.

    Raises:
        UnsupportedError: If there is such a callback. The message has its name and the reason.
    """
    for callback in callbacks_of(trainer):
        if isinstance(trainer.strategy, FSDP2Strategy):
            _check_with_shards(callback)
        if isinstance(callback, StochasticWeightAveraging):
            _check_averaging(trainer)


def _check_with_shards(callback: Callback) -> None:
    for cls in type(callback).__mro__:
        if cls.__name__ in UNSUPPORTED_WITH_SHARDS:
            raise UnsupportedError(
                f"{type(callback).__name__} is not supported with strategy='fsdp2': "
                f"{UNSUPPORTED_WITH_SHARDS[cls.__name__]}. Remove it, or use strategy='ddp'."
            )


def _check_averaging(trainer: Trainer) -> None:
    if trainer.max_epochs == -1 and not AVERAGES_WITHOUT_END:
        raise UnsupportedError(
            "before Lightning 2.6.1, StochasticWeightAveraging needs max_epochs, because it "
            "uses its average in the last epoch. Set max_epochs to the epoch counter's limit."
        )
