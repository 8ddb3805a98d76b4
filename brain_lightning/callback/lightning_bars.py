"""Makes Lightning's progress bars show the values of a Brain's own bar."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from brain_lightning.stages.epochs import Epochs
from brain_lightning.stages.run import Run
from brain_lightning.temporary import TemporaryAttributes


def show_running_loss(trainer: Trainer, run: Run, temporary: TemporaryAttributes) -> None:
    """Makes the Trainer's progress bar show the running loss at each refresh.

    Args:
        trainer: The Trainer in its ``setup``.
        run: The run.
        temporary: Records the changes.
    """
    bar = trainer.progress_bar_callback
    if bar is None:
        return
    own = bar.get_metrics

    def get_metrics(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        running = run.train.running_loss() if run.train.is_running else {}
        return {**own(trainer, pl_module), **running}

    temporary.override(bar, "get_metrics", get_metrics)


def show_epoch(trainer: Trainer, epochs: Epochs) -> None:
    """Shows the Brain's epoch number, because Lightning's starts at 0.

    Args:
        trainer: The Trainer, after its bar started the epoch.
        epochs: The epochs of the Brain.
    """
    bar, last = trainer.progress_bar_callback, last_epoch(trainer, epochs)
    name = f"Epoch {epochs.current}" + ("" if last is None else f"/{last}")
    if isinstance(bar, TQDMProgressBar):
        # A subclass may have no bar for training.
        with suppress(TypeError):
            bar.train_progress_bar.set_description(name)
    elif isinstance(bar, RichProgressBar):
        _describe(bar, f"{name:{len(bar.validation_description)}}")


def _describe(bar: RichProgressBar, name: str) -> None:
    # Both are None if the bar is disabled, for example on other ranks.
    task = bar.train_progress_bar_id
    if bar.progress is not None and task is not None:
        style = bar.theme.description
        bar.progress.update(task, description=f"[{style}]{name}" if style else name)


def last_epoch(trainer: Trainer, epochs: Epochs) -> Any:
    """Returns the number of the last epoch, from the epoch counter and ``max_epochs``.

    Args:
        trainer: The Trainer at the start of an epoch.
        epochs: The epochs of the Brain.

    Returns:
        The number, or None if neither has a known end.
    """
    counter, current = epochs.counter, epochs.current
    last = getattr(counter, "limit", None)
    if last is None and isinstance(counter, Sequence):
        last = counter[-1]
    if not isinstance(current, int) or not isinstance(last, (int, type(None))):
        return last
    ends = [] if last is None else [last]
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        ends.append(current + trainer.max_epochs - 1 - trainer.current_epoch)
    return min(ends, default=None)
