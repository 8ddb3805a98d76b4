"""Subclasses of Lightning's loops that follow a Brain's order of events."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from brain_lightning.phase import Phase
from brain_lightning.stages.evaluation import EvaluationStage
from brain_lightning.stages.run import Run
from brain_lightning.stages.sharded_evaluation import shard_length
from brain_lightning.temporary import TemporaryAttributes

from .counters import add
from .loggers import keep_step_metrics

# Phases of a resumed epoch that has no training batch left.
AFTER_TRAINING = (Phase.TRAIN_OVER, Phase.VALID_OVER)


class BrainFitLoop(_FitLoop):
    """A fit loop that advances the epoch counter last, and ends an epoch by exhaustion.

    The next epoch advances an ``EpochCounter``, so it must start after every callback
    could stop the run. This is after ``on_train_epoch_end`` and before
    ``on_train_epoch_start``, where Lightning calls no hook.
    """

    brain_run: Run
    # Runs single stages, if the recipe overrides them or has a custom fit.
    brain_runs_parts: Callable[[], None] | None

    @property
    def done(self) -> bool:
        """Whether Lightning or the epoch counter ends the run."""
        return self.brain_run.epochs.over(self._is_over())

    @property
    def is_over(self) -> bool:
        """Whether Lightning ends the run, on any rank."""
        return self.brain_run.epochs.ended(self._is_over())

    def _is_over(self) -> bool:
        # If a limit was reached after TRAIN, the rest of the epoch must still run.
        resumed_phase = self.brain_run.run_state.resumed_phase
        return super().done and resumed_phase not in AFTER_TRAINING

    def setup_data(self) -> None:
        """Creates or reloads the training loader, if needed."""
        super().setup_data()
        if self._data_fetcher is not None:
            fetch_on_demand(self._data_fetcher)

    def run(self) -> None:
        """Runs the epochs."""
        super().run() if self.brain_runs_parts is None else self.brain_runs_parts()

    def on_advance_start(self) -> None:
        """Starts the next epoch."""
        self.brain_run.start_epoch()
        super().on_advance_start()

    def on_advance_end(self) -> None:
        """Ends the epoch."""
        super().on_advance_end()
        self.brain_run.finish_epoch()

    def _warn_if_modules_in_eval_mode(self) -> None:
        """Does nothing, because a Brain stays in eval mode until its TRAIN stage starts."""

    def start_epoch(self, length: int | None) -> float | None:
        """Makes an epoch end when its loader is exhausted; the length is only displayed.

        Lightning reads the length of the training set once, and validates if the number
        of batches is a multiple of it. If the length changed, the epoch would end too early
        or without validation.

        Args:
            length: Number of batches of the training set, or None.

        Returns:
            Number of batches in the epoch, or None if it is not known.
        """
        trainer, limit = self.trainer, self.trainer.limit_train_batches
        self.max_batches = _estimate(limit, length)
        # The attribute does not exist if the interval is a time.
        interval = getattr(trainer, "val_check_interval", None)
        if isinstance(interval, float) and interval == 1.0:
            trainer.val_check_batch = float("inf")
        return None if length is None else min(length, _limit(limit, length))

    def change_length(self, length: int | None) -> None:
        """Sets the number of batches again, after the loader was changed.

        Args:
            length: Number of batches of the training set, or None.
        """
        trainer = self.trainer
        # The attribute does not exist if the interval is a time.
        interval = getattr(trainer, "val_check_interval", None)
        self.max_batches = _estimate(trainer.limit_train_batches, length)
        if isinstance(interval, float) and math.isfinite(self.max_batches):
            trainer.val_check_batch = max(1, int(self.max_batches * interval))

    def fetch_batch(self) -> bool:
        """Fetches the next training batch; if there is none, ends TRAIN.

        Returns:
            Whether there is a next batch.
        """
        run, batches = self.brain_run, self.epoch_loop.batch_progress.current.ready
        limit, stopped = self._limit_of_batches(), self._is_stopped()
        if stopped and 0 < batches < min(limit, self._length_of_epoch()):
            run.cut_short()
        last = stopped or batches >= limit or not run.train.fetch()
        self._mark_last_batch(last)
        if last:
            keep_step_metrics(self.trainer)
            run.train.end()
            # A signal in the last batch may come after the ranks exchanged their flags.
            run.end_if_terminated()
        return not last

    def _limit_of_batches(self) -> float:
        limit = self.trainer.limit_train_batches
        is_none = isinstance(limit, float) and limit == 1.0
        # Computing the length may cost as much as a small step.
        return float("inf") if is_none else _limit(limit, self._length())

    def _length_of_epoch(self) -> float:
        length = self._length()
        return float("inf") if length is None else length

    def _length(self) -> int | None:
        return self.brain_run.train.loader.known_length()

    def _is_stopped(self) -> bool:
        """Whether ``max_steps``, ``max_time`` or a callback stops the run."""
        trainer, most = self.trainer, self.epoch_loop.max_steps
        reached = 0 <= most <= trainer.global_step
        return reached or (trainer.should_stop and self._can_stop_early)

    def _mark_last_batch(self, last: bool) -> None:
        progress, fetcher = self.epoch_loop.batch_progress, self._data_fetcher
        progress.is_last_batch = last
        if not last and progress.current.ready >= self.max_batches:
            self.max_batches = float("inf")
        assert fetcher is not None
        fetcher.length, fetcher.done = None, last

    def run_validation(self) -> None:
        """Validates after a training epoch without a batch.

        Lightning validates only after a batch (``_TrainingEpochLoop.on_advance_end``).
        """
        if self.epoch_loop._should_check_val_epoch():
            self.trainer.validating = True
            self.epoch_loop.val_loop.run()
            self.trainer.training = True


class BrainEpochLoop(_TrainingEpochLoop):
    """An epoch loop that can start in the middle of an epoch.

    When Lightning restarts a loop, it skips ``on_train_epoch_start`` and fetches a batch
    before it validates. A Brain starts its stage again. Therefore the counters are set
    after Lightning has reset them.
    """

    brain_run: Run
    # Whether the last validation of an epoch runs after this loop.
    brain_validates_after: bool

    def advance(self, data_fetcher: Any) -> None:
        """Fits one batch, for which Lightning's loop always calls ``optimizer_step``."""
        self.brain_run.train.accumulates = False
        super().advance(data_fetcher)

    def _broadcast_sigterm_tensor(self) -> None:
        """Does nothing if the run handles SIGTERM, because it has its own collective."""
        if not self.brain_run.termination.handles_sigterm:
            super()._broadcast_sigterm_tensor()

    def _should_accumulate(self) -> bool:
        """Whether the Brain made no update, because loggers count updates."""
        return self.brain_run.train.accumulates

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        """Whether to validate after a batch."""
        is_last = self.batch_progress.is_last_batch
        if self.brain_validates_after and is_last:
            return False
        return super()._should_check_val_fx(data_fetcher)

    def validation_is_due(self) -> bool:
        """Whether to validate now, after the last batch of an epoch."""
        if not self.trainer.enable_validation:
            # SpeechBrain calls _fit_valid also if valid_set is None.
            return True
        if not self.batch_progress.current.ready:
            return self._should_check_val_epoch()
        fetcher = self.trainer.fit_loop._data_fetcher
        assert fetcher is not None
        return super()._should_check_val_fx(fetcher)

    def on_run_start(self, data_fetcher: Any) -> None:
        """Resumes the epoch at the saved position, with the validation if it comes next."""
        super().on_run_start(data_fetcher)
        run, epoch = self.brain_run, self.brain_run.run_state.resumed_epoch
        phase = run.run_state.resumed_phase
        if epoch is None and not run.train.fetches_collectively:
            return
        add(self.batch_progress.current, 0 if epoch is None else epoch["batches"])
        if phase in AFTER_TRAINING:
            self._resume_after_training(data_fetcher, phase)
            return
        if phase is Phase.FITTED and run.train.fetch():
            self._end_fitted_batch()
            self.on_advance_end(data_fetcher)
        elif not fit_loop_of(self.trainer).fetch_batch() or phase is Phase.BATCH_OVER:
            self._validate_if_due(data_fetcher)
        elif phase is Phase.VALIDATED:
            self._call_on_validation_end()

    def _resume_after_training(self, data_fetcher: Any, phase: Phase | None) -> None:
        run = self.brain_run
        self.batch_progress.is_last_batch = True
        data_fetcher.length, data_fetcher.done = None, True
        if phase is Phase.TRAIN_OVER:
            run.train.resume_its_end()
            self._validate_if_due(data_fetcher)
            return
        run.run_state.resume_after_validation(run.train.loader.loader)
        self._call_on_validation_end()

    def _call_on_validation_end(self) -> None:
        """Calls the callbacks after a validation that ended before the run was resumed."""
        self.trainer.validating = True
        call._call_callback_hooks(self.trainer, "on_validation_end")
        self.trainer.training = True

    def _validate_if_due(self, data_fetcher: Any) -> None:
        counted = self._batches_that_stepped
        # The batch was already counted, but the validation belongs to the step before.
        self._batches_that_stepped -= min(counted, not self._should_accumulate())
        self.on_advance_end(data_fetcher)
        self._batches_that_stepped = counted

    def _end_fitted_batch(self) -> None:
        """Calls the end hooks of a batch that was fitted before the run was resumed."""
        trainer, progress, train = self.trainer, self.batch_progress, self.brain_run.train
        batch = trainer.strategy.batch_to_device(next(train.loader))
        loss = train.resume_fitted()
        outputs = {"loss": loss} if isinstance(loss, Tensor) else None
        for count in ("ready", "started", "processed"):
            getattr(progress, f"increment_{count}")()
        arguments = (outputs, batch, self.batch_idx)
        call._call_callback_hooks(trainer, "on_train_batch_end", *arguments)
        call._call_lightning_module_hook(trainer, "on_train_batch_end", *arguments)
        progress.increment_completed()


class BrainEvaluationLoop(_EvaluationLoop):
    """An evaluation loop that runs to the end of its loaders."""

    brain_stage: EvaluationStage
    # Maximum number of batches of each loader.
    brain_limits: Sequence[float] = ()

    def reset(self) -> None:
        """Starts the evaluation, without fetching a batch before the stage starts."""
        super().reset()
        fetch_on_demand(self._data_fetcher)

    def end_by_exhaustion(self, sharded: bool) -> None:
        """Removes every limit except for the Trainer's ``limit_..._batches``.

        Args:
            sharded: Whether this rank evaluates only a shard of the batches.
        """
        trainer, combined, fetcher = self.trainer, self._combined_loader, self._data_fetcher
        assert combined is not None
        assert fetcher is not None
        limit = trainer.limit_test_batches if trainer.testing else trainer.limit_val_batches
        lengths = [loader.known_length() for loader in combined.flattened]
        self._max_batches = [_estimate(limit, length) for length in lengths]
        limits = [_limit(limit, length) for length in lengths]
        if sharded:
            limits = [shard_length(all_of_them) for all_of_them in limits]
        combined._iterator.limits = self.brain_limits = limits  # type: ignore[union-attr]
        fetcher.length, fetcher.done = None, False


def fetch_on_demand(fetcher: Any) -> None:
    """Disables prefetching, which Lightning uses for loaders without a length.

    Args:
        fetcher: The fetcher of a loop. It found no batch, because no stage has started.
    """
    if fetcher.prefetch_batches:
        fetcher.prefetch_batches = 0
        iter(fetcher)


def become(loop: Any, cls: type, temporary: TemporaryAttributes, **attributes: Any) -> None:
    """Changes the class of one of Lightning's loops, for one run.

    Args:
        loop: The loop.
        cls: A subclass of the loop's class.
        temporary: Records the changes.
        **attributes: Attributes to set on the loop.
    """
    temporary.set(loop, "__class__", cls)
    for name, value in attributes.items():
        temporary.override(loop, name, value)


def fit_loop_of(trainer: Trainer) -> BrainFitLoop:
    """Returns the fit loop of a Trainer that fits a Brain.

    Args:
        trainer: The Trainer after its ``setup``.
    """
    loop = trainer.fit_loop
    assert isinstance(loop, BrainFitLoop)
    return loop


def evaluation_loop_of(trainer: Trainer) -> BrainEvaluationLoop:
    """Returns the running evaluation loop.

    Args:
        trainer: The Trainer of a Brain, in a validation or a test.
    """
    loop = trainer.test_loop if trainer.testing else trainer.validate_loop
    if trainer.state.fn is TrainerFn.FITTING:
        loop = trainer.fit_loop.epoch_loop.val_loop
    assert isinstance(loop, BrainEvaluationLoop)
    return loop


def _limit(limit: float, length: int | None) -> float:
    """Returns the number of batches that a ``limit_..._batches`` of the Trainer allows."""
    if isinstance(limit, int):
        return limit
    # A fraction of an unknown length has raised an error before.
    return float("inf") if limit == 1.0 or length is None else int(limit * length)


def _estimate(limit: float, length: int | None) -> float:
    """Estimates the number of batches, for progress bars and ``is_last_batch``."""
    return min(_limit(limit, length), float("inf") if length is None else max(1, length))
