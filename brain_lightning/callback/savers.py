"""Who may save when: what has to be noted for an exact resume follows from it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from brain_lightning.lightning_internals.lean_loops import BATCH_HOOKS, STEP_HOOKS
from brain_lightning.lightning_internals.strategies import is_requeued
from brain_lightning.lightning_internals.trainer_callbacks import callbacks_of, has_hook
from brain_lightning.protocol import BrainProtocol

# What a recipe saves with, by the names in its code.
SAVES = {"checkpointer", "save_checkpoint", "save_and_keep_only", "_save_intra_epoch_ckpt"}

# Methods of a Brain that run outside of a batch.
OUTSIDE = {
    "__init__", "on_fit_start", "init_optimizers", "on_stage_start", "on_stage_end",
    "on_evaluate_start", "evaluate", "fit", "make_dataloader", "_save_intra_epoch_ckpt",
    "_should_save_intra_epoch_ckpt",
}  # fmt: skip


def saves_between_batches(trainer: Trainer) -> bool:
    """Whether something may save when the next batch is fetched and not yet fitted.

    Args:
        trainer: The Trainer in its ``setup``.
    """
    validates_within = getattr(trainer, "val_check_interval", None) != 1.0
    return validates_within or _has_foreign_hooks(trainer, BATCH_HOOKS)


def saves_within_batch(trainer: Trainer, brain: BrainProtocol) -> bool:
    """Whether something may save in the middle of a batch.

    Args:
        trainer: The Trainer in its ``setup``.
        brain: The Brain that is going to run.
    """
    return (
        any(_saves_on_exception(callback) for callback in callbacks_of(trainer))
        or is_requeued(trainer)
        or _has_foreign_hooks(trainer, STEP_HOOKS)
        or _saves_in_a_batch(type(brain))
    )


def _saves_on_exception(callback: Callback) -> bool:
    # An argument of ModelCheckpoint since Lightning 2.5.4.
    by_argument = getattr(callback, "save_on_exception", False)
    return bool(by_argument) or isinstance(callback, OnExceptionCheckpoint)


def _has_foreign_hooks(trainer: Trainer, hooks: tuple[str, ...]) -> bool:
    """Lightning's own callbacks save at the end of a batch, after every other callback."""
    return any(
        has_hook(callback, hook)
        for callback in callbacks_of(trainer)
        if not type(callback).__module__.startswith(("lightning.", "brain_lightning."))
        for hook in hooks
    )


def _saves_in_a_batch(cls: type) -> bool:
    """Whether a recipe's code names what it saves with, in what runs within a batch."""
    return any(
        SAVES.intersection(_names(function.__code__))
        for base in cls.__mro__
        if not base.__module__.startswith(("brain_lightning.", "speechbrain."))
        for name, value in vars(base).items()
        # Also one that is decorated.
        if isinstance(function := inspect.unwrap(value), FunctionType) and name not in OUTSIDE
    )


def _names(code: CodeType) -> Iterator[Any]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
