"""Lightning's fit loop, with the epochs of a Brain and a beginning within an epoch.

Private parts of Lightning: see ``_loops.py``, and ``tests/test_loops.py``.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from .epochs import Epochs
from .stages import Stages


class _BrainFitLoop(_FitLoop):
    """A fit loop that asks the epoch counter last.

    Drawing an epoch moves an ``EpochCounter``, so it may only happen once every
    callback has had its say about stopping. That is after ``on_train_epoch_end``
    and before ``on_train_epoch_start``, where Lightning has no hook.
    """

    brain_epochs: Epochs

    @property
    def done(self) -> bool:
        """Whether the run is over, for Lightning or for the epoch counter."""
        return super().done or not self.brain_epochs.more()

    def _warn_if_modules_in_eval_mode(self) -> None:
        """Nothing: a Brain stays in eval mode until its TRAIN stage begins with train()."""


class _BrainEpochLoop(_TrainingEpochLoop):
    """An epoch loop that can begin in the middle of an epoch.

    Lightning's own restart leaves out ``on_train_epoch_start`` and draws a batch
    before it validates, while a Brain begins its stage again; so the counters are
    set, once Lightning has reset them.
    """

    brain_stages: Stages

    def on_run_start(self, data_fetcher: Any) -> None:
        """Goes on where the epoch was left, and validates if that is what came next."""
        super().on_run_start(data_fetcher)
        stages = self.brain_stages
        resumed = stages.run_state.resumed_batches
        if resumed is None and not stages.draws_together:
            return
        self.batch_progress.current.increment_by(resumed or 0)
        drawn = self.trainer.lightning_module.draw_batch()
        if not drawn or (resumed is not None and not stages.run_state.validated):
            self.on_advance_end(data_fetcher)
            self._batches_that_stepped -= 1


def rule_fit_loop(trainer: Trainer, stages: Stages) -> None:
    """Lets the stages of a Brain rule the fit loop.

    Args:
        trainer: The Trainer in its ``setup``.
        stages: The stages of the run.
    """
    loop: Any = trainer.fit_loop
    loop.__class__, loop.brain_epochs = _BrainFitLoop, stages.epochs
    loop.epoch_loop.__class__ = _BrainEpochLoop
    loop.epoch_loop.brain_stages = stages


def release_fit_loop(trainer: Trainer) -> None:
    """Gives the Trainer its own fit loop back.

    Args:
        trainer: The Trainer at the end of a run.
    """
    loop: Any = trainer.fit_loop
    if hasattr(loop, "brain_epochs"):
        loop.__class__, loop.epoch_loop.__class__ = _FitLoop, _TrainingEpochLoop
        del loop.brain_epochs, loop.epoch_loop.brain_stages


def progress(trainer: Trainer) -> dict[str, int]:
    """How far a Trainer is.

    Args:
        trainer: The Trainer in ``fit``.

    Returns:
        The epochs that are over, and the steps, as ``set_progress`` takes them.
    """
    epochs = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    return {"epochs": epochs, "global_step": trainer.global_step}


def set_progress(trainer: Trainer, epochs: int, global_step: int, batches: int) -> None:
    """Sets the counts that Lightning keeps, before its loops begin.

    Args:
        trainer: The Trainer in ``on_fit_start``.
        epochs: Epochs that are over.
        global_step: Steps so far.
        batches: Batches so far, over all epochs.
    """
    loop, epoch_progress = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_progress
    for tracker in (epoch_progress.total, epoch_progress.current):
        tracker.reset()
        tracker.increment_by(epochs)
    loop.batch_progress.total.reset()
    loop.batch_progress.total.increment_by(batches)
    loop._batches_that_stepped = batches
    automatic = loop.automatic_optimization.optim_progress.optimizer.step.total
    for steps in (automatic, loop.manual_optimization.optim_step_progress.total):
        steps.reset()
        steps.increment_by(global_step)
