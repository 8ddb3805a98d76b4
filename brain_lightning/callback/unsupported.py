"""Lightning's callbacks that cannot do their work with a Brain in some settings."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging

from brain_lightning.compat.versions import AVERAGES_WITHOUT_END
from brain_lightning.errors import UnsupportedError
from brain_lightning.fsdp2.strategy import FSDP2Strategy
from brain_lightning.lightning_internals.trainer_callbacks import callbacks_of

# Those that cannot where modules are sharded, and why. WeightAveraging and EMAWeightAveraging
# came with Lightning 2.6.
COPIES = "it copies modules, and there is no copy of one in shards"
REFUSED_WITH_SHARDS = {
    "WeightAveraging": COPIES,
    "StochasticWeightAveraging": COPIES,
    "ModelPruning": "it looks for the smallest of all weights, and each process has a part",
}


def check_callbacks(trainer: Trainer) -> None:
    """Refuses the callbacks of a Trainer that cannot do their work with a Brain.

    Args:
        trainer: The Trainer, before it runs.

    Raises:
        UnsupportedError: There is one; it is named, with the reason.
    """
    for callback in callbacks_of(trainer):
        if isinstance(trainer.strategy, FSDP2Strategy):
            _check_with_shards(callback)
        if isinstance(callback, StochasticWeightAveraging):
            _check_averaging(trainer)


def _check_with_shards(callback: Callback) -> None:
    for cls in type(callback).__mro__:
        if cls.__name__ in REFUSED_WITH_SHARDS:
            raise UnsupportedError(
                f"{type(callback).__name__} does not work with strategy='fsdp2': "
                f"{REFUSED_WITH_SHARDS[cls.__name__]}. Leave it out, or use strategy='ddp'"
            )


def _check_averaging(trainer: Trainer) -> None:
    if trainer.max_epochs == -1 and not AVERAGES_WITHOUT_END:
        raise UnsupportedError(
            "StochasticWeightAveraging takes its average in the last of max_epochs, before "
            "Lightning 2.6.1, and there is none: give max_epochs as many as the epoch counter"
        )
