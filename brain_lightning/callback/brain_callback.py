"""When things happen in a run, and what is allowed: the Brain's semantics as a callback."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from lightning.pytorch import Callback, LightningModule, Trainer

from brain_lightning.checkpoints.checkpointer import Checkpointer
from brain_lightning.distributed.communication import collectively
from brain_lightning.distributed.ddp import wrap_modules
from brain_lightning.lightning_internals import loaders as _loops
from brain_lightning.lightning_internals.loops import progress, set_progress
from brain_lightning.lightning_internals.strategies import (
    check_strategy,
    is_parallel,
    synchronize_nothing,
)
from brain_lightning.loggers.train_logger import begin_log, leave_to_trainer
from brain_lightning.stage import Stage
from brain_lightning.stages.interval_checkpoints import is_asked_for
from brain_lightning.stages.run import Run
from brain_lightning.stages.sharded_evaluation import draws_together
from brain_lightning.temporary import TemporaryAttributes

from .progress_bars import feed_bar, name_epoch
from .reconcile import accumulate, reconcile, wraps_itself
from .trainer_state import (
    resume_trainer,
    save_within_epoch,
    saves_between_batches,
    trainer_state,
)
from .unsupported import check_averaging, refuse_callbacks

logger = logging.getLogger(__name__)


class BrainCallback(Callback):
    """Runs the stages of a Brain at the right moments of a Trainer.

    The generated module brings it along (``configure_callbacks``); a user adds
    nothing. What it changes on the Trainer it puts back when the run is over.

    Args:
        run: The run.
        trainer: The Trainer that is going to run them.

    Raises:
        RunOptionError: Trainer and Brain were told different things.
        UnsupportedError: A callback of the Trainer cannot do its work with a Brain.
    """

    def __init__(self, run: Run, trainer: Trainer) -> None:
        self.run = run
        self._for_the_run = TemporaryAttributes()
        self._for_the_epoch = TemporaryAttributes()
        # Lightning checks its arguments before any hook of a callback.
        self._for_the_check = TemporaryAttributes()
        self._before_the_test: dict[str, int] | None = None
        check_strategy(trainer)
        refuse_callbacks(trainer, run.brain)
        try:
            reconcile(trainer, run.brain, self._for_the_run)
        except BaseException:
            self._for_the_run.restore()
            raise
        self._for_the_check.set(trainer, "accumulate_grad_batches", 1)
        own: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        within = Run.is_running(run.brain)
        self._beside = [] if within else _others(run.brain.trainer_callbacks, own)
        # Lightning lets those that a module brings replace others of their class.
        trainer.callbacks = [*own, *self._beside]  # type: ignore[attr-defined]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes over the loops, before any loader is looked at."""
        self._for_the_check.restore()
        self.run.begin()
        if is_parallel(trainer):
            synchronize_nothing(pl_module)
        # On one process of several, evaluate() runs on a Trainer of that process alone.
        self.run.progressbar &= trainer.is_global_zero
        self.run.progressbar &= not getattr(self.run.brain, "rank", 0)
        self.run.progressbar &= trainer.progress_bar_callback is None
        feed_bar(trainer, self.run, self._for_the_run)
        self.run.metrics.watch(self.run.brain, self._for_the_run)
        leave_to_trainer(self.run.brain, trainer.loggers, self._for_the_run)
        self.run.metrics.validated = trainer.enable_validation
        _loops.attach(trainer, self.run, self._for_the_run)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Goes on from what was recovered, where something was."""
        state = self.run.run_state
        state.of_trainer = partial(trainer_state, trainer, self.run)
        state.position.notes_draws = saves_between_batches(trainer)
        if state.resumed is not None:
            resume_trainer(trainer, self.run, state.resumed)
        self._begin_log()
        if trainer.checkpoint_callbacks or is_asked_for(self.run.brain):
            self.run.save_with_trainer = partial(save_within_epoch, trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens to SIGTERM, where there is something to save with."""
        if self.run.brain.checkpointer is not None or self.run.save_with_trainer:
            self.run.termination.listen(_loops.is_lightnings_handler)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the TRAIN stage."""
        name_epoch(trainer, self.run.epochs)
        length = self.run.train_loader.known_length()
        _loops.start_train_epoch(trainer, length)
        self.run.steps_on_last_batch = accumulate(
            trainer, self.run.brain, self._for_the_epoch, length
        )
        self.run.draws_together = draws_together(_loops.limited_length(trainer, length))
        self.run.start_train()
        brain = self.run.brain
        if is_parallel(trainer) and not wraps_itself(brain):
            # A callback, or the stage's start, may have unfrozen something.
            wrap_modules(brain)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets the validation run to the end of its loader."""
        self.run.end_if_terminated()
        _loops.start_validation(trainer, self.run.is_shared_out(Stage.VALID))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets the test run to the end of its loader, and stand where the Brain is."""
        self._begin_log()
        _loops.start_validation(trainer, shared_out=False)
        if trainer.global_step == 0:
            # One that has trained nothing would log at the very beginning.
            self._before_the_test = progress(trainer)
            steps = self.run.brain.optimizer_step
            # Lightning's loggers count batches.
            batches = steps * self.run.brain.grad_accumulation_factor
            set_progress(trainer, self._epochs_over(), steps, batches)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends an epoch that had no batch, and decides about the next one."""
        if self.run.in_training:
            self.run.end_train()
            _loops.run_validation(trainer)
        self.run.end_epoch()
        self._for_the_epoch.restore()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says what has ended the training, and what a callback could not bring to its end."""
        for stopping in trainer.early_stopping_callbacks:
            if stopping is not None and stopping.stopped_epoch:
                said = "EarlyStopping(%r) ended the training after epoch %s."
                logger.info(said, stopping.monitor, self.run.epochs.current)
        check_averaging(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remembers a Ctrl-C, which Lightning turns into SystemExit, and tidies up."""
        if isinstance(exception, KeyboardInterrupt):
            self.run.interrupt = exception
        elif trainer.world_size > 1 and isinstance(exception, Exception):
            # Now: the others are about to fail of this, each with an error of its own.
            failed = "Rank %d failed, and the others end with it."
            logger.error(failed, trainer.global_rank, exc_info=exception)
        self._restore(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the Trainer back as it was, once the last checkpoint is durable."""
        self._restore(trainer)
        checkpointer = self.run.brain.checkpointer
        if isinstance(checkpointer, Checkpointer):
            # Before another process looks for it; each evaluates by itself.
            several = trainer.world_size > 1
            collectively(checkpointer.wait) if several else checkpointer.wait()

    def _begin_log(self) -> None:
        brain = self.run.brain
        goes_on = self.run.run_state.resumed is not None or brain.optimizer_step > 0
        begin_log(brain, goes_on, self._epochs_over())

    def _epochs_over(self) -> int:
        epochs = self.run.run_state.epochs
        found = getattr(self.run.epochs.counter, "current", epochs)
        return found if isinstance(found, int) else epochs

    def _restore(self, trainer: Trainer) -> None:
        if self._before_the_test is not None:
            set_progress(trainer, **self._before_the_test, batches=0)
            self._before_the_test = None
        self.run.close()
        self.run.termination.restore()
        _loops.detach(trainer)
        for temporary in (self._for_the_epoch, self._for_the_check, self._for_the_run):
            temporary.restore()
        # The next module of this Trainer may be no Brain's.
        trainer.callbacks = _others(trainer.callbacks, [self, *self._beside])  # type: ignore[attr-defined]


def _others(callbacks: Sequence[Callback], known: Sequence[Callback]) -> list[Callback]:
    return [callback for callback in callbacks if not any(callback is each for each in known)]
