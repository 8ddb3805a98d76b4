"""Who may save when: what has to be noted for an exact resume follows from it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from brain_lightning.lightning_internals.lean_loops import BATCH_HOOKS, STEP_HOOKS
from brain_lightning.lightning_internals.strategies import is_requeued
from brain_lightning.lightning_internals.trainer_callbacks import callbacks_of
from brain_lightning.protocol import BrainProtocol

# What recipes and callbacks save with, by the names in their code.
SAVES = {"checkpointer", "save_checkpoint", "save_and_keep_only", "_save_intra_epoch_ckpt"}

# Methods of a Brain that run within a batch.
WITHIN = (
    "fit_batch", "optimizers_step", "compute_forward", "compute_objectives",
    "on_fit_batch_start", "on_fit_batch_end", "check_gradients", "check_loss_isfinite",
    "freeze_optimizers", "zero_grad", "no_sync",
)  # fmt: skip

# Whose own code saves where a batch is over.
LIBRARIES = ("brain_lightning.", "speechbrain.", "lightning.", "torch.")


def saves_between_batches(trainer: Trainer) -> bool:
    """Whether something may save when the next batch is fetched and not yet fitted.

    Args:
        trainer: The Trainer in its ``setup``.
    """
    validates_within = getattr(trainer, "val_check_interval", None) != 1.0
    return validates_within or _any_saves(callbacks_of(trainer), BATCH_HOOKS)


def saves_within_batch(trainer: Trainer, brain: BrainProtocol) -> bool:
    """Whether something may save in the middle of a batch.

    Args:
        trainer: The Trainer in its ``setup``.
        brain: The Brain that is going to run.
    """
    callbacks = callbacks_of(trainer)
    return (
        any(_saves_on_exception(callback) for callback in callbacks)
        or is_requeued(trainer)
        or _any_saves(callbacks, STEP_HOOKS)
        or _any_saves([brain], WITHIN)
    )


def _saves_on_exception(callback: Callback) -> bool:
    # An argument of ModelCheckpoint since Lightning 2.5.4.
    by_argument = getattr(callback, "save_on_exception", False)
    return bool(by_argument) or isinstance(callback, OnExceptionCheckpoint)


def _any_saves(owners: Iterable[Any], methods: Iterable[str]) -> bool:
    """Whether what some methods reach of their owner's code names what it saves with."""
    return any(SAVES.intersection(_reached(owner, methods)) for owner in owners)


def _reached(owner: Any, methods: Iterable[str]) -> set[str]:
    found, waiting = set(methods), list(methods)
    while waiting:
        for function in _functions(owner, waiting.pop()):
            new = set(_names(function.__code__)) - found
            found |= new
            waiting += new
    return found


def _functions(owner: Any, name: str) -> Iterator[FunctionType]:
    """Every definition of a method that is not a library's, also one that is decorated."""
    for holder in (owner, *type(owner).__mro__):
        value = vars(holder).get(name)
        value = getattr(value, "fget", None) or getattr(value, "__func__", value)
        function = inspect.unwrap(value) if callable(value) else None
        if isinstance(function, FunctionType) and not _is_of_a_library(function):
            yield function


def _is_of_a_library(function: FunctionType) -> bool:
    return function.__module__.startswith(LIBRARIES)


def _names(code: CodeType) -> Iterator[Any]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
