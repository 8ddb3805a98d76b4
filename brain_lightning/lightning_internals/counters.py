"""Reads and sets Lightning's progress counters: epochs, batches and steps."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def add(tracker: Any, events: int) -> None:
    """Adds to all counts of a tracker; its ``increment_by`` is new in Lightning 2.5.

    Args:
        tracker: One of Lightning's progress trackers.
        events: Number to add to ready, started, processed and completed.
    """
    for name, so_far in vars(tracker).items():
        setattr(tracker, name, so_far + events)


def count_steps(trainer: Trainer, steps: int) -> None:
    """Corrects ``trainer.global_step`` to count the optimizer steps of the Brain.

    Lightning's automatic optimization counts each call of ``optimizer_step``, also without
    an update. Its manual optimization counts only the steps of its optimizer wrappers.

    Args:
        trainer: The Trainer in a training batch.
        steps: Number of steps that Lightning did not count; -1 if it counted one too many.
    """
    for tracker in step_trackers(trainer):
        add(tracker, steps)


def step_trackers(trainer: Trainer) -> tuple[Any, Any]:
    """Returns the trackers from which Lightning computes ``trainer.global_step``.

    Args:
        trainer: The Trainer in ``fit``.
    """
    automatic, manual = _steps(trainer)
    used = automatic if trainer.lightning_module.automatic_optimization else manual
    return used.total, used.current


def progress(trainer: Trainer) -> dict[str, int]:
    """Returns the counts of a Trainer.

    Args:
        trainer: The Trainer in ``fit``.

    Returns:
        The completed epochs and the steps, as keyword arguments of ``set_progress``.
    """
    epochs = trainer.fit_loop.epoch_progress.current.completed
    return {"epochs": epochs, "global_step": trainer.global_step}


def logged_steps(trainer: Trainer) -> int:
    """Returns the step of loggers.

    Args:
        trainer: The Trainer in ``fit``.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def batches_so_far(trainer: Trainer) -> tuple[int, int]:
    """Returns the counts of all previous fits of a Trainer.

    Args:
        trainer: The Trainer before its loops start.

    Returns:
        The number of batches, and the step of loggers.
    """
    loop = trainer.fit_loop.epoch_loop
    return loop.batch_progress.total.ready, logged_steps(trainer)


def set_progress(
    trainer: Trainer, epochs: int, global_step: int, batches: int, windows: int
) -> None:
    """Sets the counts of a Trainer, before its loops start.

    Args:
        trainer: The Trainer in ``on_fit_start``.
        epochs: Number of completed epochs.
        global_step: Number of optimizer steps so far.
        batches: Number of batches so far, over all epochs.
        windows: Number of accumulation windows so far.
    """
    loop, epoch_progress = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_progress
    loop._batches_that_stepped = windows
    for tracker, events in (
        (epoch_progress.total, epochs),
        (epoch_progress.current, epochs),
        (loop.batch_progress.total, batches),
        *((steps.total, global_step) for steps in _steps(trainer)),
    ):
        tracker.reset()
        add(tracker, events)


def reloads(trainer: Trainer) -> list[float]:
    """Returns when the loaders were reloaded (``reload_dataloaders_every_n_epochs``).

    Args:
        trainer: The Trainer in ``fit``.

    Returns:
        The epoch of the training loader, and the epoch of the validation loader.
    """
    fit: Any = trainer.fit_loop
    valid = fit.epoch_loop.val_loop
    return [fit._last_train_dl_reload_epoch, valid._last_val_dl_reload_epoch]


def set_reloads(trainer: Trainer, epochs: list[float]) -> None:
    """Restores when the loaders were reloaded, after Lightning has created them again.

    Args:
        trainer: The Trainer in ``on_train_start``.
        epochs: Return value of ``reloads``.
    """
    fit: Any = trainer.fit_loop
    valid = fit.epoch_loop.val_loop
    fit._last_train_dl_reload_epoch, valid._last_val_dl_reload_epoch = epochs


def _steps(trainer: Trainer) -> tuple[Any, Any]:
    loop = trainer.fit_loop.epoch_loop
    return (
        loop.automatic_optimization.optim_progress.optimizer.step,
        loop.manual_optimization.optim_step_progress,
    )
