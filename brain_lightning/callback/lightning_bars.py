"""Lightning's progress bars, with what a Brain's own bar shows."""

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
    """Lets the Trainer's bar show the running loss, which it reads when it refreshes.

    Args:
        trainer: The Trainer in its ``setup``.
        run: The run.
        temporary: Records what is changed.
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
    """Shows the Brain's number of the epoch, where Lightning counts from 0.

    Args:
        trainer: The Trainer, after its bar has begun the epoch.
        epochs: The epochs of the Brain.
    """
    bar, last = trainer.progress_bar_callback, last_epoch(trainer, epochs)
    name = f"Epoch {epochs.current}" + ("" if last is None else f"/{last}")
    if isinstance(bar, TQDMProgressBar):
        # One of a subclass may have no bar for training.
        with suppress(TypeError):
            bar.train_progress_bar.set_description(name)
    elif isinstance(bar, RichProgressBar):
        _describe(bar, f"{name:{len(bar.validation_description)}}")


def _describe(bar: RichProgressBar, name: str) -> None:
    # Neither is there where the bar is switched off, as on other ranks.
    task = bar.train_progress_bar_id
    if bar.progress is not None and task is not None:
        style = bar.theme.description
        bar.progress.update(task, description=f"[{style}]{name}" if style else name)


def last_epoch(trainer: Trainer, epochs: Epochs) -> Any:
    """The number of the last epoch, for the counter or for the Trainer.

    Args:
        trainer: The Trainer at the start of an epoch.
        epochs: The epochs of the Brain.

    Returns:
        None where neither has an end that is known.
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
