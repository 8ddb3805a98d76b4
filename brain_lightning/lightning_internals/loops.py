"""Lightning's fit loop, with the epochs of a Brain and a beginning within an epoch.

Private parts of Lightning: see ``_loops.py``, and ``tests/lightning_internals/test_loops.py``.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.exceptions import SIGTERMException

from brain_lightning.compat.versions import BROADCASTS_SIGTERM
from brain_lightning.stages.epochs import Epochs
from brain_lightning.stages.run import Run


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

    brain_run: Run
    # Callbacks that look at batches; None where Lightning's own steps are needed.
    brain_watchers: list[Callback] | None = None

    def on_run_start(self, data_fetcher: Any) -> None:
        """Goes on where the epoch was left, and validates if that is what came next."""
        super().on_run_start(data_fetcher)
        self.brain_watchers = _watchers(self.trainer)
        run = self.brain_run
        resumed = run.run_state.resumed_batches
        if resumed is None and not run.draws_together:
            return
        count(self.batch_progress.current, resumed or 0)
        drawn = self.trainer.lightning_module.draw_batch()
        if not drawn or (resumed is not None and not run.run_state.validated):
            self.on_advance_end(data_fetcher)
            self._batches_that_stepped -= 1

    def advance(self, data_fetcher: Any) -> None:
        """One batch, without what nobody listens to.

        Lightning's own way asks every callback, profiler and logger at each hook, and
        sets attributes of the module around it: more than the work of a small model.
        """
        if self.brain_watchers is None:
            super().advance(data_fetcher)
            return
        lightnings = BROADCASTS_SIGTERM and not self.brain_run.termination.is_installed
        if lightnings and self.trainer.world_size > 1:
            # Lightning's handler of SIGTERM, in another process, waits for this answer.
            self._broadcast_sigterm_tensor()
        batch = next(self.brain_run.train_loader)
        if batch is not None and self.trainer.strategy.root_device.type != "cpu":
            batch = call._call_strategy_hook(self.trainer, "batch_to_device", batch)
        progress, batch_idx = self.batch_progress, self.batch_idx + 1
        progress.is_last_batch = False
        progress.increment_ready()
        output = self._fit(batch, batch_idx)
        progress.increment_processed()
        self.trainer.lightning_module.on_train_batch_end(output, batch, batch_idx)
        if self.brain_watchers:
            self.trainer._logger_connector.on_batch_end()
        progress.increment_completed()
        if self.brain_watchers:
            self.trainer._logger_connector.update_train_step_metrics()

    def _fit(self, batch: Any, batch_idx: int) -> Any:
        trainer, watchers = self.trainer, self.brain_watchers
        if watchers:
            trainer._logger_connector.on_batch_start(batch)
        output = None
        if batch is None:
            self._warning_cache.warn("train_dataloader yielded None: it is left out")
        else:
            if watchers:
                call._call_callback_hooks(trainer, "on_train_batch_start", batch, batch_idx)
            self.batch_progress.increment_started()
            output = trainer.lightning_module.fit_batch(batch, batch_idx)
        if watchers:
            call._call_callback_hooks(trainer, "on_train_batch_end", output, batch, batch_idx)
        return output

    def on_advance_end(self, data_fetcher: Any) -> None:
        """Validates, where it is time to, and counts the batch."""
        trainer = self.trainer
        ends = trainer.should_stop or trainer.received_sigterm
        if self.brain_watchers is None or ends or self._should_check_val_fx(data_fetcher):
            super().on_advance_end(data_fetcher)
        else:
            self._batches_that_stepped += 1


# What a callback may do within a step, and what it may see of one.
STEP_HOOKS = (
    "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step",
)  # fmt: skip
BATCH_HOOKS = ("on_train_batch_start", "on_train_batch_end")


def _watchers(trainer: Trainer) -> list[Callback] | None:
    """The callbacks that look at batches; None where Lightning's own steps are needed."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    automatic = trainer.lightning_module.automatic_optimization
    # One that steps by hand calls it as well, and what is logged there needs Lightning.
    hooks = STEP_HOOKS if automatic else STEP_HOOKS[-1:]
    within = any(listens(callback, hook) for callback in callbacks for hook in hooks)
    # StochasticWeightAveraging brings a scheduler, which Lightning's own loop steps.
    if within or trainer.lr_scheduler_configs or not _is_plain(trainer):
        return None
    return [c for c in callbacks if any(listens(c, hook) for hook in BATCH_HOOKS)]


def _is_plain(trainer: Trainer) -> bool:
    """Whether a batch is for the Brain alone: nothing converts it, moves it or times it."""
    return (
        type(trainer.strategy) in (SingleDeviceStrategy, DDPStrategy)
        and type(trainer.precision_plugin) is Precision
        and isinstance(trainer.profiler, PassThroughProfiler)  # type: ignore[attr-defined]
        and trainer.datamodule is None  # type: ignore[attr-defined]
    )


class _BrainEvaluationLoop(_EvaluationLoop):
    """An evaluation loop that leaves out what nobody listens to, as the epoch loop."""

    brain_is_alone = False

    def on_run_start(self) -> None:
        """Looks for who listens."""
        super().on_run_start()
        kind = "test" if self.trainer.testing else "validation"
        hooks = (f"on_{kind}_batch_start", f"on_{kind}_batch_end")
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        watched = any(listens(c, hook) for c in callbacks for hook in hooks)
        self.brain_is_alone = _is_plain(self.trainer) and not watched

    def _evaluation_step(
        self, batch: Any, batch_idx: int, dataloader_idx: int, dataloader_iter: Any
    ) -> None:
        if not self.brain_is_alone:
            super()._evaluation_step(batch, batch_idx, dataloader_idx, dataloader_iter)
            return
        trainer, module = self.trainer, self.trainer.lightning_module
        if trainer.strategy.root_device.type != "cpu":
            arguments = {"dataloader_idx": dataloader_idx}
            batch = call._call_strategy_hook(trainer, "batch_to_device", batch, **arguments)
        self.batch_progress.increment_ready()
        self.batch_progress.increment_started()
        step = module.test_step if trainer.testing else module.validation_step
        step(batch, batch_idx, dataloader_idx)
        self.batch_progress.increment_processed()
        self.batch_progress.increment_completed()
        # ModelCheckpoint asks, and complains of a metric that no validation has brought.
        self._has_run = True
        if trainer.received_sigterm:
            raise SIGTERMException


def _validations_and_tests(trainer: Trainer) -> list[Any]:
    """The loops of validation and test, that of ``fit`` first.

    Args:
        trainer: Any Trainer.
    """
    return [trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop]


def listens(callback: Callback, hook: str) -> bool:
    """Whether a callback has a hook of its own, be it of the instance.

    Args:
        callback: The callback.
        hook: A method of ``Callback``.
    """
    method = getattr(callback, hook)
    return getattr(method, "__func__", None) is not getattr(Callback, hook)


def rule_fit_loop(trainer: Trainer, run: Run) -> None:
    """Lets the stages of a Brain rule the fit loop.

    Args:
        trainer: The Trainer in its ``setup``.
        run: The run.
    """
    loop: Any = trainer.fit_loop
    loop.__class__, loop.brain_epochs = _BrainFitLoop, run.epochs
    loop.epoch_loop.__class__ = _BrainEpochLoop
    loop.epoch_loop.brain_run = run


def rule_evaluation_loops(trainer: Trainer) -> None:
    """Lets validations and tests leave out what nobody listens to.

    Args:
        trainer: The Trainer in its ``setup``.
    """
    for loop in _validations_and_tests(trainer):
        loop.__class__ = _BrainEvaluationLoop


def release_loops(trainer: Trainer) -> None:
    """Gives the Trainer its own loops back.

    Args:
        trainer: The Trainer at the end of a run.
    """
    for evaluation_loop in _validations_and_tests(trainer):
        evaluation_loop.__class__ = _EvaluationLoop
        vars(evaluation_loop).pop("brain_is_alone", None)
    loop: Any = trainer.fit_loop
    if hasattr(loop, "brain_epochs"):
        loop.__class__, loop.epoch_loop.__class__ = _FitLoop, _TrainingEpochLoop
        del loop.brain_epochs, loop.epoch_loop.brain_run
        vars(loop.epoch_loop).pop("brain_watchers", None)


def count(tracker: Any, events: int) -> None:
    """Adds to all that a tracker counts (its ``increment_by`` came with Lightning 2.5).

    Args:
        tracker: One of Lightning's progress trackers.
        events: How many more have been made ready, started, processed and completed.
    """
    for name, so_far in vars(tracker).items():
        setattr(tracker, name, so_far + events)


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
        count(tracker, epochs)
    loop.batch_progress.total.reset()
    count(loop.batch_progress.total, batches)
    loop._batches_that_stepped = batches
    automatic = loop.automatic_optimization.optim_progress.optimizer.step.total
    for steps in (automatic, loop.manual_optimization.optim_step_progress.total):
        steps.reset()
        count(steps, global_step)
