"""The counts that Lightning keeps: epochs, batches and steps."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def add(tracker: Any, events: int) -> None:
    """Adds to all that a tracker counts (its ``increment_by`` came with Lightning 2.5).

    Args:
        tracker: One of Lightning's progress trackers.
        events: How many more have been made ready, started, processed and completed.
    """
    for name, so_far in vars(tracker).items():
        setattr(tracker, name, so_far + events)


def count_steps(trainer: Trainer, steps: int) -> None:
    """Makes ``trainer.global_step`` count what the Brain counts.

    Lightning's automatic optimization counts each call of ``optimizer_step``, with an
    update or without; its manual optimization the steps of its own wrappers only.

    Args:
        trainer: The Trainer in a training batch.
        steps: Steps that Lightning has not counted; -1 for one too many.
    """
    for tracker in step_trackers(trainer):
        add(tracker, steps)


def step_trackers(trainer: Trainer) -> tuple[Any, Any]:
    """What ``trainer.global_step`` is read from, for who counts in each batch.

    Args:
        trainer: The Trainer in ``fit``.
    """
    automatic, by_hand = _steps(trainer)
    taken = automatic if trainer.lightning_module.automatic_optimization else by_hand
    return taken.total, taken.current


def progress(trainer: Trainer) -> dict[str, int]:
    """The counts of a Trainer.

    Args:
        trainer: The Trainer in ``fit``.

    Returns:
        The epochs that are over, and the steps, as ``set_progress`` takes them.
    """
    epochs = trainer.fit_loop.epoch_progress.current.completed
    return {"epochs": epochs, "global_step": trainer.global_step}


def logged_steps(trainer: Trainer) -> int:
    """How many steps loggers have counted.

    Args:
        trainer: The Trainer in ``fit``.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def batches_so_far(trainer: Trainer) -> tuple[int, int]:
    """What a Trainer has counted in the fits before, all of them together.

    Args:
        trainer: The Trainer before its loops begin.

    Returns:
        Its batches, and those by which loggers count.
    """
    loop = trainer.fit_loop.epoch_loop
    return loop.batch_progress.total.ready, logged_steps(trainer)


def set_progress(
    trainer: Trainer, epochs: int, global_step: int, batches: int, windows: int
) -> None:
    """Sets the counts of a Trainer, before its loops begin.

    Args:
        trainer: The Trainer in ``on_fit_start``.
        epochs: Epochs that are over.
        global_step: Steps so far.
        batches: Batches so far, over all epochs.
        windows: Those of them that ended a window of accumulation.
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
    """The epochs in which the loaders were made (``reload_dataloaders_every_n_epochs``).

    Args:
        trainer: The Trainer in ``fit``.

    Returns:
        That of the training loader, and that of the validation's.
    """
    fit: Any = trainer.fit_loop
    valid = fit.epoch_loop.val_loop
    return [fit._last_train_dl_reload_epoch, valid._last_val_dl_reload_epoch]


def set_reloads(trainer: Trainer, epochs: list[float]) -> None:
    """Counts on from where loaders were made before, once they are made again.

    Args:
        trainer: The Trainer in ``on_train_start``.
        epochs: From ``reloads``.
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
