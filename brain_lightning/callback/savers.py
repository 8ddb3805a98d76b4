"""Determines whether callbacks or the recipe may save between or within batches.

An exact resume from such a save needs additional records, which cost time and memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from brain_lightning.lightning_internals.lean_loops import BATCH_HOOKS, STEP_HOOKS
from brain_lightning.lightning_internals.trainer_callbacks import callbacks_of
from brain_lightning.protocol import BrainProtocol
from brain_lightning.references import referenced

# Names in the code of recipes and callbacks that indicate a save.
# (A validation in the middle of a batch calls on_stage_end, which saves.)
SAVES = {
    "checkpointer", "save_checkpoint", "save_and_keep_only", "_save_intra_epoch_ckpt",
    "_fit_valid",
}  # fmt: skip

# Methods of a Brain that are called within a batch.
WITHIN = (
    "fit_batch", "optimizers_step", "compute_forward", "compute_objectives",
    "on_fit_batch_start", "on_fit_batch_end", "check_gradients", "check_loss_isfinite",
    "freeze_optimizers", "zero_grad", "no_sync",
)  # fmt: skip


def saves_between_batches(trainer: Trainer) -> bool:
    """Whether a save may happen after the next batch is fetched and before it is fitted.

    Args:
        trainer: The Trainer in its ``setup``.
    """
    validates_within = getattr(trainer, "val_check_interval", None) != 1.0
    return validates_within or _any_saves(callbacks_of(trainer), BATCH_HOOKS)


def saves_within_batch(trainer: Trainer, brain: BrainProtocol) -> bool:
    """Whether a save may happen in the middle of a batch.

    Args:
        trainer: The Trainer in its ``setup``.
        brain: The Brain that is about to run.
    """
    callbacks = callbacks_of(trainer)
    return (
        # With oom_patience, the changes of a batch that failed must be undone.
        brain._lightning.oom_patience is not None
        or any(_saves_on_exception(callback) for callback in callbacks)
        or _any_saves(callbacks, STEP_HOOKS)
        or _any_saves([brain], WITHIN)
    )


def _saves_on_exception(callback: Callback) -> bool:
    # ModelCheckpoint has this argument since Lightning 2.5.4.
    by_argument = getattr(callback, "save_on_exception", False)
    return bool(by_argument) or isinstance(callback, OnExceptionCheckpoint)


def _any_saves(owners: Iterable[Any], methods: Iterable[str]) -> bool:
    """Whether the code that the methods reach contains a name from ``SAVES``."""
    names = list(methods)
    return any(SAVES & {*names, *referenced(owner, names)} for owner in owners)
