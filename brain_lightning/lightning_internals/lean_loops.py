"""Loops that skip hooks that no callback overrides: identical results in less time.

Lightning calls each callback, profiler and logger at each hook, and sets attributes of the
module around the call. This takes longer than the step of a small model. A Brain would also
run without this file and the call of ``make_lean``; ``fit_batch`` of the generated modules
would then be unused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import WarningCache  # type: ignore[attr-defined]

from brain_lightning.compat.versions import BROADCASTS_SIGTERM
from brain_lightning.fsdp2.strategy import FSDP2Strategy
from brain_lightning.temporary import TemporaryAttributes

from .counters import add, step_trackers
from .loops import BrainEpochLoop, BrainEvaluationLoop, become
from .trainer_callbacks import callbacks_of, has_hook

# Hooks within a step, and hooks before and after a batch.
STEP_HOOKS = (
    "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step",
)  # fmt: skip
BATCH_HOOKS = ("on_train_batch_start", "on_train_batch_end")


class LeanEpochLoop(BrainEpochLoop):
    """An epoch loop that calls only hooks that a callback overrides."""

    # Callbacks that override batch hooks; None if Lightning's own steps are needed.
    brain_watchers: list[Callback] | None
    brain_warnings: WarningCache
    brain_module: Any
    # Trackers of optimizer steps.
    brain_steps: Sequence[Any]
    # Moves a batch to the device; None on the CPU.
    brain_moves: Callable[[Any], Any] | None
    brain_broadcasts_sigterm: bool

    def on_run_start(self, data_fetcher: Any) -> None:
        """Determines which hooks are needed, and values that are constant in all batches."""
        trainer = self.trainer
        self.brain_watchers = _watchers(trainer)
        self.brain_module, self.brain_steps = trainer.lightning_module, step_trackers(trainer)
        self.brain_moves = _mover(trainer)
        # Lightning's SIGTERM handler of another rank waits for this collective.
        self.brain_broadcasts_sigterm = (
            BROADCASTS_SIGTERM
            and trainer.world_size > 1
            and not self.brain_run.termination.handles_sigterm
        )
        super().on_run_start(data_fetcher)

    def advance(self, data_fetcher: Any) -> None:
        """Fits batches, until Lightning's loop has to act between two batches."""
        if self.brain_watchers is None:
            super().advance(data_fetcher)
            return
        self._fit_next()
        while not self._is_due(data_fetcher):
            self._batches_that_stepped += not self.brain_run.train.accumulates
            self._fit_next()

    def _is_due(self, data_fetcher: Any) -> bool:
        """Whether Lightning's loop has to act: the epoch or a validation may be due."""
        trainer = self.trainer
        if self.batch_progress.is_last_batch or trainer.should_stop:
            return True
        # val_check_batch is a number of batches within the epoch, or None for a time interval.
        within = trainer.val_check_batch != float("inf")
        return trainer.received_sigterm or (within and self._should_check_val_fx(data_fetcher))

    def _fit_next(self) -> None:
        """Fits the next batch, and fetches the one after it."""
        trainer, progress = self.trainer, self.batch_progress
        if self.brain_broadcasts_sigterm:
            self._broadcast_sigterm_tensor()
        batch = next(self.brain_run.train.loader)
        if batch is not None and self.brain_moves is not None:
            batch = self.brain_moves(batch)
        batch_idx = progress.current.ready
        progress.is_last_batch = False
        progress.increment_ready()
        fit = self._fit_watched if self.brain_watchers else self._fit
        fit(batch, batch_idx)
        progress.increment_processed()
        self.brain_module.end_batch(trainer)
        if self.brain_watchers:
            trainer._logger_connector.on_batch_end()
        progress.increment_completed()
        if self.brain_watchers:
            trainer._logger_connector.update_train_step_metrics()

    def _fit_watched(self, batch: Any, batch_idx: int) -> None:
        """Calls ``_fit`` and the batch hooks of callbacks."""
        trainer = self.trainer
        trainer._logger_connector.on_batch_start(batch)
        if batch is not None:
            call._call_callback_hooks(trainer, "on_train_batch_start", batch, batch_idx)
        output = self._fit(batch, batch_idx)
        call._call_callback_hooks(trainer, "on_train_batch_end", output, batch, batch_idx)

    def _fit(self, batch: Any, batch_idx: int) -> Any:
        if batch is None:
            self.brain_warnings.warn("train_dataloader yielded None, which is skipped.")
            return None
        self.batch_progress.increment_started()
        output = self.brain_module.fit_batch(batch, batch_idx)
        if steps := self.brain_run.train.steps:
            for tracker in self.brain_steps:
                add(tracker, steps)
        return output


class LeanEvaluationLoop(BrainEvaluationLoop):
    """An evaluation loop that skips batch hooks if no callback overrides one."""

    # Evaluates a batch; None if Lightning's own steps are needed.
    brain_evaluates: Callable[[Any], Any] | None
    # Moves a batch to the device; None on the CPU.
    brain_moves: Callable[[Any], Any] | None

    def on_run_start(self) -> None:
        """Determines whether a callback overrides a batch hook."""
        super().on_run_start()
        trainer, stage = self.trainer, self.brain_stage
        kind = "test" if trainer.testing else "validation"
        hooks = (f"on_{kind}_batch_start", f"on_{kind}_batch_end")
        watched = any(has_hook(c, hook) for c in callbacks_of(trainer) for hook in hooks)
        self.brain_evaluates = None if watched or not _is_plain(trainer) else stage.evaluate
        self.brain_moves = _mover(trainer)

    def _evaluation_step(
        self, batch: Any, batch_idx: int, dataloader_idx: int, dataloader_iter: Any
    ) -> None:
        if self.brain_evaluates is None:
            super()._evaluation_step(batch, batch_idx, dataloader_idx, dataloader_iter)
            return
        self._evaluate(batch)
        # ModelCheckpoint reads it, and warns about a missing metric if it is False.
        self._has_run = True
        if self.brain_limits[dataloader_idx] == float("inf"):
            # Evaluate all remaining batches here, because Lightning's iterators take time.
            for each in self.brain_stage.loaders[dataloader_idx]:
                self._evaluate(each)

    def _evaluate(self, batch: Any) -> None:
        assert self.brain_evaluates is not None
        progress = self.batch_progress
        if self.brain_moves is not None:
            batch = self.brain_moves(batch)
        progress.increment_ready()
        progress.increment_started()
        self.brain_evaluates(batch)
        progress.increment_processed()
        progress.increment_completed()
        if self.trainer.received_sigterm:
            raise SIGTERMException


def make_lean(loops: Sequence[Any], temporary: TemporaryAttributes) -> None:
    """Makes the loops of a Brain skip hooks that no callback overrides.

    Args:
        loops: The loops; loops with other classes than in ``loops.py`` are not changed.
        temporary: Records the changes.
    """
    for loop in loops:
        if isinstance(loop, BrainEvaluationLoop):
            become(loop, LeanEvaluationLoop, temporary, brain_evaluates=None, brain_moves=None)
        elif isinstance(loop, BrainEpochLoop):
            state = {"brain_watchers": None, "brain_warnings": WarningCache()}
            become(loop, LeanEpochLoop, temporary, **state)


def _watchers(trainer: Trainer) -> list[Callback] | None:
    """Returns callbacks with batch hooks, or None if Lightning's own steps are needed."""
    callbacks = callbacks_of(trainer)
    automatic = trainer.lightning_module.automatic_optimization
    # ManualModule calls on_before_optimizer_step itself, but self.log there needs Lightning.
    hooks = STEP_HOOKS if automatic else STEP_HOOKS[-1:]
    within = any(has_hook(callback, hook) for callback in callbacks for hook in hooks)
    # StochasticWeightAveraging adds a scheduler, which Lightning's own loop steps.
    if within or trainer.lr_scheduler_configs or not _is_plain(trainer):
        return None
    return [c for c in callbacks if any(has_hook(c, hook) for hook in BATCH_HOOKS)]


def _mover(trainer: Trainer) -> Callable[[Any], Any] | None:
    """Returns a function that moves a batch to the device, or None on the CPU."""
    on_cpu = trainer.strategy.root_device.type == "cpu"
    return None if on_cpu else trainer.strategy.batch_to_device


def _is_plain(trainer: Trainer) -> bool:
    """Whether no plugin, profiler or DataModule converts, moves or times a batch."""
    return (
        type(trainer.strategy) in (SingleDeviceStrategy, DDPStrategy, FSDP2Strategy)
        and type(trainer.precision_plugin) is Precision
        and isinstance(trainer.profiler, PassThroughProfiler)  # type: ignore[attr-defined]
        and trainer.datamodule is None  # type: ignore[attr-defined]
    )
