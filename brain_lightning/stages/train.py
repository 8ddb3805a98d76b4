"""The TRAIN stages of a run: ``speechbrain.Brain._fit_train``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from brain_lightning.compat.versions import add_note
from brain_lightning.distributed.communication import if_main_process, on_any_rank
from brain_lightning.phase import Phase
from brain_lightning.stage import Stage
from brain_lightning.step.out_of_memory import free, is_out_of_memory, notes
from brain_lightning.step.synchronized import average_window
from brain_lightning.step.valid_step import reset_valid_step
from brain_lightning.step.window import is_full, restart_window

from .base import RunStage
from .error_context import with_error_context
from .interval_checkpoints import IntervalCheckpoints
from .loader import StageLoader
from .metrics import scalar

logger = logging.getLogger(__name__)


class TrainStage(RunStage):
    """TRAIN: runs once per epoch.

    Attributes:
        loader: Training loader, as the Trainer iterates it.
        is_running: Whether a TRAIN stage has started and not ended.
        steps_on_last_batch: Whether an incomplete accumulation window makes an update.
        fetches_collectively: Whether ranks may run out of data at different batches.
        batches: Number of training batches so far, over all epochs.
        earlier: Number of training batches of the epochs that are over.
        windows: Number of accumulation windows that ended, over all epochs. Loggers use it
            as their step. Without gradient accumulation each batch is a window.
        steps: Number of optimizer steps of the last batch.
        accumulates: Whether the last batch made no update, because its window is not full.
        step: The Brain's ``step`` for the current batch.
    """

    kind = Stage.TRAIN
    loader: StageLoader
    is_running = False
    steps_on_last_batch = False
    fetches_collectively = False
    batches = 0
    earlier = 0
    windows = 0
    steps = 0
    accumulates = False
    step = 0
    # None before the first and after the last batch, when a recipe may itself fit batches.
    _checkpoints: IntervalCheckpoints | None = None
    # Stages whose batch is being fitted. A recipe may fit another Brain within a batch.
    _fitting: ClassVar[list[TrainStage]] = []

    def wrap(
        self, loaders: Sequence[Iterable[Any]], names: Sequence[str] = ("",)
    ) -> list[StageLoader]:
        """See ``RunStage.wrap``. TRAIN has one loader."""
        (self.loader,) = super().wrap(loaders)
        return self.loaders

    @property
    def phase_after(self) -> Phase:
        """See ``RunStage.phase_after``."""
        return Phase.TRAIN_OVER

    @property
    def is_innermost(self) -> bool:
        """Whether a batch of this run is being fitted, and not a batch of a nested run."""
        return bool(self._fitting) and self._fitting[-1] is self

    @with_error_context
    def start(self) -> None:
        """Starts the TRAIN stage of the next epoch."""
        brain, epoch = self.brain, self.epoch
        self.is_running = True
        self.run.current = self
        resumed = self.run_state.resumed_epoch
        if resumed is not None and if_main_process():
            logger.info("Resuming epoch %s after batch %d", epoch, resumed["batches"])
        self.run_state.start_training(self.loader.loader)
        brain.on_stage_start(self.brain_stage, epoch)
        brain.modules.train()
        brain.zero_grad()
        restart_window(brain)
        brain.nonfinite_count = 0
        if hasattr(brain.train_sampler, "set_epoch"):
            brain.train_sampler.set_epoch(epoch)
        self._checkpoints = IntervalCheckpoints(self.run)
        self.loader.start()

    def run_by_recipe(self) -> None:
        """Runs the TRAIN stage of the next epoch by the custom loop of the recipe."""
        assert self.by_recipe is not None
        self.run.current = self
        restart_window(self.brain)
        self.run_state.start_by_recipe()
        self.by_recipe()
        self.run_state.phase = Phase.TRAIN_OVER

    def resume_its_end(self) -> None:
        """Resumes an epoch whose training is over. Called after ``start``."""
        self.run_state.resume_after_training()
        self.loader.close()
        self._reset()

    def resume_fitted(self) -> Any:
        """Resumes after a fitted batch, whose batch-end hooks were not called yet.

        Returns:
            The loss of the batch.
        """
        self.batches += 1
        return self.run_state.loss

    @with_error_context
    def fit(
        self,
        batch: Any,
        fit_batch: Callable[[Any], Any],
        last: bool,
        step: Callable[[], None],
    ) -> Any:
        """Counts a batch, fits it and averages its loss.

        Args:
            batch: Batch as the DataLoader returned it.
            fit_batch: Fits the batch and returns the loss.
            last: Whether the Trainer expects this batch to be the last of the epoch.
            step: Makes the update of an accumulation window whose last batch is skipped, if
                it can.

        Returns:
            The detached loss.
        """
        brain, state = self.brain, self.run_state
        state.begin_batch()
        brain.step += 1
        self.step = brain.step
        brain._lightning.ends_window = last and self.steps_on_last_batch
        self.steps = 0
        self._fitting.append(self)
        try:
            loss = fit_batch(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            loss = self._skip(error, batch, step)
        finally:
            self._fitting.pop()
        brain.avg_train_loss = brain.update_average(loss, brain.avg_train_loss)
        self._count_steps(self.steps)
        state.loss, state.phase = loss, Phase.FITTED
        self.batches += 1
        return loss

    def _undo_or_end(self, error: Exception, batch: Any) -> None:
        """Undoes the changes of a batch that ran out of memory.

        If the patience is exhausted, the run is saved and ends. It resumes with this batch.

        Args:
            error: Out-of-memory error of the batch. It is raised again if the run ends.
            batch: Batch as the DataLoader returned it.
        """
        run, before = self.run, self.run_state.before
        run.locate(error, batch)
        free(error, self.brain.device)
        is_shared = run.flags.is_everywhere(error)
        if is_undone := is_shared and before.undo():
            self.run_state.phase = Phase.FITTING
        if not is_undone or before.skipped >= (self.brain._lightning.oom_patience or 0):
            self._note_save(error, is_shared, is_undone)
            raise error

    def _skip(self, error: Exception, batch: Any, step: Callable[[], None] | None) -> Tensor:
        """Skips a batch that ran out of memory. Only the Brain's ``step`` counts it.

        Args:
            error: See ``_undo_or_end``.
            batch: See ``_undo_or_end``.
            step: See ``fit``; None if this update has run out of memory too.

        Returns:
            NaN, as the loss of the batch.
        """
        self._undo_or_end(error, batch)
        self.run.forget_error()
        brain, before = self.brain, self.run_state.before
        brain.step = self.step
        if step is None or before.steps:
            # The update would run out of memory again.
            before.drop_gradients()
        elif brain.grad_accumulation_factor > 1 and is_full(brain) and average_window(brain):
            try:
                step()
            except Exception as of_step:
                if not is_out_of_memory(of_step):
                    raise
                return self._skip(of_step, batch, None)
        before.skipped += 1
        logger.warning(
            "Out of memory. The batch is skipped (%d of %d that oom_patience allows in this "
            "epoch). %s",
            before.skipped,
            brain._lightning.oom_patience,
            "; ".join([str(error).partition("\n")[0] or type(error).__name__, *notes(error)]),
        )
        self.steps = brain.optimizer_step - before.counts["optimizer_step"]
        return torch.tensor(torch.nan)

    def _note_save(self, error: Exception, is_shared: bool, is_undone: bool) -> None:
        """Saves the run as it was before the batch, and notes the outcome on the error."""
        if not is_shared:
            note = (
                "the run was not saved, because the other ranks cannot take part in the save. "
                "Set oom_patience=0: if a forward or backward pass runs out of memory on any "
                "rank, all ranks save and end."
            )
        elif not is_undone:
            note = (
                "the run was not saved, because an optimizer had begun its step. Set "
                "oom_patience=0: this step is undone before the save."
            )
        elif self.run.save_after_error():
            note = "the run was saved, and resumes with this batch"
        else:
            note = "the run was not saved"
        add_note(error, f"brain_lightning: {note}")

    @property
    def fitted_batches(self) -> int:
        """Number of ``batches``, plus the batch whose ``on_fit_batch_end`` is running."""
        return self.batches + (self.run_state.phase is Phase.STEPPED)

    @property
    def is_fitted(self) -> bool:
        """Whether the current batch has made its update."""
        return self.run_state.phase in (Phase.STEPPED, Phase.FITTED)

    @property
    def uncounted_steps(self) -> int:
        """Number of steps that the Trainer counts only at the end of this batch."""
        return self.steps if self.run_state.phase is Phase.STEPPED else 0

    def stepped(self, loss: Any, steps: int) -> None:
        """Records the update of a batch. Called before ``on_fit_batch_end``.

        Args:
            loss: Loss of the batch.
            steps: Number of steps that the Trainer has not counted.
        """
        self.run_state.loss, self.run_state.phase = loss, Phase.STEPPED
        self._count_steps(steps)

    def _count_steps(self, steps: int) -> None:
        self.steps = steps
        self.accumulates = self.brain.grad_accumulation_factor > 1 and not steps

    def step_metrics(self) -> dict[str, Tensor]:
        """Returns the loss of the last batch by the names that ``LightningModule.log`` uses.

        Returns:
            Loss by name. Empty outside of TRAIN, before its first batch, and if an overridden
            ``fit_batch`` does not return a number.
        """
        fitted = self.is_running and self.batches > self.earlier
        loss = scalar(self.run_state.loss) if fitted else None
        return {} if loss is None else {"train_loss_step": loss, "train_loss": loss}

    def end_batch(self) -> None:
        """Counts a batch after all batch-end hooks were called. May save, or end the run."""
        self.windows += not self.accumulates
        self.run_state.end_batch()
        is_terminated, is_time_to_save = self.run.flags.take(self.brain.device)
        if not self._is_debugged():
            assert self._checkpoints is not None
            self._checkpoints.after_step(is_time_to_save)
            if is_terminated:
                self.run.end_if_terminated()

    def flags_of_rank(self) -> tuple[bool, bool]:
        """Returns the flags that ``end_batch`` reads. A flag of one rank holds for all ranks.

        Returns:
            Whether a signal requests to end the run, and whether it is time to save.
        """
        return self.run.termination.is_requested, self.is_time_to_save()

    def is_time_to_save(self) -> bool:
        """Whether a checkpoint within the epoch is due by the clock of rank 0."""
        return self._checkpoints is not None and self._checkpoints.is_time()

    def fetch(self) -> bool:
        """Fetches the next batch.

        Returns:
            Whether all ranks have a next batch.
        """
        fetched = not self._is_debugged() and self.loader.fetch()
        if not self.fetches_collectively or not on_any_rank(not fetched, self.brain.device):
            return fetched
        if fetched:
            logger.warning(
                "Another rank has no training batch left after batch %d. The epoch ends on "
                "all ranks.",
                self.run_state.position.fitted,
            )
        return False

    @with_error_context
    def end(self) -> None:
        """Ends the TRAIN stage."""
        brain, metrics, loss = self.brain, self.run.metrics, self.brain.avg_train_loss
        self._checkpoints = None
        self.loader.close()
        brain.zero_grad(set_to_none=True)
        restart_window(brain)
        self.run_state.end_training()
        # Added before the hook, because the hook may save it. Added again after the hook,
        # because the hook may report another number by the same name.
        metrics.add(Stage.TRAIN, {"loss": loss})
        with self._ending():
            brain.on_stage_end(self.brain_stage, loss, self.epoch)
        metrics.add(Stage.TRAIN, {"loss": loss})
        self._reset()

    def _reset(self) -> None:
        self._checkpoints = None
        self.brain.avg_train_loss = 0.0
        self.brain.step = 0
        reset_valid_step(self.brain)
        self.brain._lightning.ends_window = False
        self.is_running = False

    def limit_reached(self) -> bool:
        """Whether the number of updates has reached ``optimizer_step_limit``."""
        # A recipe may override this property.
        return bool(self.brain._optimizer_step_limit_exceeded)

    def _average(self) -> float:
        return self.brain.avg_train_loss

    def _iterate(self, loader: Iterable[Any], position: int) -> Iterator[Any]:
        return self.run_state.batches(loader)

    def _batches(self, loader: Iterable[Any], position: int) -> Iterator[Any]:
        """Yields batches like ``for batch in train_set`` of ``_fit_train``."""
        with self._bar(loader, position) as bar:
            for batch in bar:
                if self.limit_reached():
                    # The message of SpeechBrain's _fit_train.
                    logger.info("Train iteration limit exceeded")
                    return
                yield batch
