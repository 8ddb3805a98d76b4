"""The callback that runs the stages of a Brain from the hooks of a Trainer."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from brain_lightning.checkpoints.checkpointer import Checkpointer
from brain_lightning.distributed.communication import collectively
from brain_lightning.lightning_internals import strategies
from brain_lightning.lightning_internals.attach import attach
from brain_lightning.lightning_internals.contract import check_contract
from brain_lightning.lightning_internals.counters import progress, set_progress
from brain_lightning.lightning_internals.loops import evaluation_loop_of, fit_loop_of
from brain_lightning.lightning_internals.signals import is_lightning_handler, requeue_signal
from brain_lightning.lightning_internals.trainer_callbacks import (
    callbacks_of,
    overwrite_files,
    repair,
    save_as_automatic,
)
from brain_lightning.loggers.csv_rows import RunRows
from brain_lightning.loggers.train_logger import begin_log, leave_to_trainer
from brain_lightning.phase import Phase
from brain_lightning.stages.run import Run
from brain_lightning.stages.sharded_evaluation import fetches_collectively
from brain_lightning.step.synchronized import synchronize_oom
from brain_lightning.step.wrap import save_full_states, wrap_modules, wraps_itself
from brain_lightning.temporary import TemporaryAttributes
from brain_lightning.trials.finders import Finders
from brain_lightning.trials.preflight import preflight_if_asked, preflight_ignores

from .averaged_weights import average_at_end
from .lightning_bars import show_epoch, show_running_loss
from .monitored import warn_of_unknown_names
from .reconcile import reconcile, reconcile_accumulation
from .recoverables import is_saved
from .sharded_checkpoints import check_folder
from .trainer_side import LightningSide
from .unsupported import check_callbacks

logger = logging.getLogger(__name__)


class BrainCallback(Callback):
    """Runs the stages of a Brain from the hooks of a Trainer.

    The generated module adds this callback (``configure_callbacks``). It restores the Trainer
    when the run is over.

    Before the first batch, the hooks run in this order: ``on_fit_start`` resumes the run and
    starts the searches of LearningRateFinder and BatchSizeFinder, which may change a loader.
    Then Lightning creates the loaders and loads the optimizer states of a ``ckpt_path``.
    ``on_train_start`` restores the remaining state and runs preflight, which needs both. An
    overridden ``fit`` resumes the run later, when it calls its first stage.

    Args:
        run: The run.
        trainer: The Trainer of the run.
        progressbar: Whether to show SpeechBrain's progress bar if the Trainer has none.
        own_fit: The overridden ``fit`` of the recipe, if it calls the stages of the run.

    Raises:
        RunOptionError: If an argument of the Trainer contradicts a run option.
        UnsupportedError: If a callback of the Trainer does not work with a Brain, or the
            installed Lightning lacks a private name that is needed.
    """

    def __init__(
        self,
        run: Run,
        trainer: Trainer,
        progressbar: bool = False,
        own_fit: Callable[[], Any] | None = None,
    ) -> None:
        self.run = run
        self._progressbar = progressbar
        self._own_fit = own_fit
        self._for_the_epoch = TemporaryAttributes()
        # Still in effect when the next callbacks are called at the end of the epoch.
        self._until_the_next_epoch = TemporaryAttributes()
        # Lightning checks its arguments before it calls any hook of a callback.
        self._for_the_check = TemporaryAttributes()
        self._detects_anomalies = torch.is_anomaly_enabled()
        check_contract()
        strategies.check_strategy(trainer)
        check_callbacks(trainer)
        is_fit = trainer.state.fn is TrainerFn.FITTING
        logs = is_fit and trainer.is_global_zero
        self._rows = RunRows(trainer.loggers if logs else (), run.run_state)
        with TemporaryAttributes() as temporary:
            reconcile(trainer, run.brain, temporary)
            self._finders = Finders(run, trainer, temporary)
            # If one of these calls raises, the context manager restores everything.
            self._for_the_run = temporary.pop_all()
        self._for_the_check.set(trainer, "accumulate_grad_batches", 1)
        own, self._is_within = callbacks_of(trainer), Run.is_running(run.brain)
        of_every_run = () if self._is_within else run.brain._lightning.trainer_callbacks
        self._added = _without(of_every_run, own)
        # Callbacks from configure_callbacks would replace the user's callbacks of their class.
        trainer.callbacks = [*own, *self._added]  # type: ignore[attr-defined]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attaches the stages to the Trainer's loops, before Lightning uses any loader."""
        self._for_the_check.restore()
        if stage == "fit":
            check_folder(self.run.brain)
        # If there are several processes, evaluate() runs on a separate Trainer in each.
        is_first = trainer.is_global_zero and not getattr(self.run.brain, "rank", 0)
        shows_bar = self._progressbar and is_first and trainer.progress_bar_callback is None
        self._side = LightningSide(trainer, self.run, self._rows, shows_bar)
        for callback in callbacks_of(trainer):
            repair(callback, self._for_the_run)
        average_at_end(trainer, self.run, self._for_the_run)
        self.run.begin(self._side)
        if strategies.is_parallel(trainer):
            strategies.disable_synchronization(pl_module)
            if stage != "fit" and self.run.brain._lightning.sharding is not None:
                # In fit, modules are wrapped after they are compiled.
                wrap_modules(self.run.brain)
        if is_saved(self.run):
            checkpointer = self.run.brain.checkpointer
            others = callbacks_of(trainer)
            self._side.average.register(others, checkpointer, self._for_the_run)
        show_running_loss(trainer, self.run, self._for_the_run)
        self.run.metrics.watch(self.run.brain, self._for_the_run)
        leave_to_trainer(self.run.brain, trainer.loggers, self._for_the_run)
        if self._side.validates:
            self.run.metrics.valids.add("loss")
        resume = partial(self._resume, trainer)
        attach(trainer, self.run, self._for_the_run, self._own_fit, resume)
        if stage == "fit":
            warn_of_unknown_names(trainer, self.run.brain, self._side.validates)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resumes the run if there is a checkpoint; an overridden ``fit`` does it later."""
        if self._own_fit is None:
            self._resume(trainer)

    def _resume(self, trainer: Trainer) -> None:
        state, brain = self.run.run_state, self.run.brain
        if brain._lightning.oom_patience is not None and trainer.world_size > 1:
            synchronize_oom(brain, self._for_the_run)
        state.position.records_fetches = self._side.saves_after_fetch
        if state.resumed is not None:
            self._side.resume(state.resumed)
        else:
            self._rows.begin()
        if not state.explicit:
            resumes = state.resumed is not None
            self._side.average.resume(trainer.lightning_module, resumes)
        others = _without(callbacks_of(trainer), [self])
        if not trainer.lightning_module.automatic_optimization:
            save_as_automatic(trainer, self._for_the_run)
        self._side.called_hooks.watch(others, self._for_the_run)
        self._side.average.watch(others, self._for_the_run)
        self._begin_log()
        self._finders.start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores the remaining state, runs preflight and installs signal handlers."""
        self._side.resume_after_loading()
        self._preflight(trainer)
        if self._detects_anomalies:
            # The user enabled it around the run, and Lightning has just disabled it.
            torch.autograd.set_detect_anomaly(True)
        requeues = requeue_signal(trainer)
        if requeues is not None:
            self.run.termination.install(requeues, is_lightning_handler)
        # On several ranks, Lightning's handler would need a collective in each batch.
        if requeues is not None or self.run.saves or trainer.world_size > 1:
            self.run.termination.install(signal.SIGTERM, is_lightning_handler)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the TRAIN stage, unless the resumed epoch was already validated."""
        run, loop = self.run, fit_loop_of(trainer)
        self._until_the_next_epoch.restore()
        show_epoch(trainer, run.epochs)
        if run.train.by_recipe is not None:
            return
        if run.run_state.resumed_phase is Phase.VALID_OVER:
            overwrite_files(trainer, self._until_the_next_epoch)
            return
        length = run.train.loader.known_length()
        limited = loop.start_epoch(length)
        run.train.steps_on_last_batch = reconcile_accumulation(
            trainer, run.brain, self._for_the_epoch, length
        )
        run.train.fetches_collectively = fetches_collectively(limited)
        run.train.start()
        if strategies.is_parallel(trainer) and not wraps_itself(run.brain):
            # A callback or on_stage_start may have unfrozen or replaced modules.
            wrap_modules(run.brain)
            save_full_states(run.brain)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the validation run to the end of its loader."""
        if not self.run.valid.is_within_training:
            self.run.end_if_terminated()
        evaluation_loop_of(trainer).end_by_exhaustion(self.run.valid.is_sharded)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the test run to the end of its loader, with the counters of the Brain."""
        self._preflight(trainer)
        self._begin_log()
        evaluation_loop_of(trainer).end_by_exhaustion(sharded=False)
        if trainer.global_step == 0:
            # Otherwise a Trainer that did not train would log the results at step 0.
            before = progress(trainer)
            self._for_the_run.callback(set_progress, trainer, **before, batches=0, windows=0)
            steps = self.run.brain.optimizer_step
            batches = steps * self.run.brain.grad_accumulation_factor
            set_progress(trainer, self._epochs_over(), steps, batches, windows=steps)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends an epoch that had no batch, and decides whether there is a next epoch."""
        if self.run.train.is_running:
            self.run.train.end()
            fit_loop_of(trainer).run_validation()
        self.run.end_epoch()
        self._side.show_unfrozen()
        self._for_the_epoch.restore()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs whether EarlyStopping ended the training."""
        for stopping in trainer.early_stopping_callbacks:
            if stopping is not None and stopping.stopped_epoch:
                message = "EarlyStopping(%r) ended the training after epoch %s."
                logger.info(message, stopping.monitor, self.run.epochs.current)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Records a KeyboardInterrupt, which Lightning replaces; restores the Trainer."""
        if isinstance(exception, KeyboardInterrupt):
            self.run.interrupt = exception
        elif (
            trainer.world_size > 1
            and isinstance(exception, Exception)
            and not preflight_ignores(exception, trainer)
        ):
            # Log it now, before the other ranks fail in a collective and hide this error.
            message = "Rank %d failed, which also ends the other ranks."
            logger.error(message, trainer.global_rank, exc_info=exception)
        self._restore(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restores the Trainer, and waits until the last checkpoint is written."""
        self._restore(trainer)
        checkpointer = self.run.brain.checkpointer
        if isinstance(checkpointer, Checkpointer):
            # The other ranks may look for it next, because each rank evaluates by itself.
            several = trainer.world_size > 1
            collectively(checkpointer.wait) if several else checkpointer.wait()

    def _preflight(self, trainer: Trainer) -> None:
        if not self._is_within:
            preflight_if_asked(self.run, trainer, by_own_fit=self._own_fit is not None)

    def _begin_log(self) -> None:
        brain = self.run.brain
        resumes = self.run.run_state.resumed is not None or brain.optimizer_step > 0
        begin_log(brain, resumes, self._epochs_over())

    def _epochs_over(self) -> int:
        epochs = self.run.run_state.epochs
        found = getattr(self.run.epochs.counter, "current", epochs)
        return found if isinstance(found, int) else epochs

    def _restore(self, trainer: Trainer) -> None:
        self.run.close()
        self.run.termination.restore()
        for temporary in (
            self._until_the_next_epoch,
            self._for_the_epoch,
            self._for_the_check,
            self._for_the_run,
        ):
            temporary.restore()
        # The user may run the Trainer with another LightningModule next.
        rest = _without(callbacks_of(trainer), [self, *self._added])
        trainer.callbacks = rest  # type: ignore[attr-defined]


def _without(callbacks: Sequence[Callback], removed: Sequence[Callback]) -> list[Callback]:
    return [each for each in callbacks if not any(each is other for other in removed)]
