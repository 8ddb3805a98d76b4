"""The TRAIN stages of a run: ``speechbrain.Brain._fit_train``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from brain_lightning.compat.versions import add_note
from brain_lightning.distributed.communication import on_any_rank
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
    """TRAIN: once in each epoch.

    Attributes:
        loader: The training loader, as the Trainer iterates it.
        is_running: Whether a TRAIN stage has started and not ended.
        steps_on_last_batch: Whether an incomplete accumulation window makes an update.
        fetches_collectively: Whether ranks may run out of data at different batches.
        batches: Training batches so far, over all epochs.
        earlier: Those of the epochs that are over.
        windows: Batches that ended a window of accumulation, over all epochs: loggers count by
            it, and where nothing is accumulated it is each batch.
        steps: Steps of the last batch.
        accumulates: Whether the last batch made no update, for its window is not full.
        step: The Brain's, in the batch in hand.
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
    # While there are batches: a recipe may fit some by itself before and after.
    _checkpoints: IntervalCheckpoints | None = None
    # Stages whose batch is being fitted; a recipe may fit another Brain within.
    _fitting: ClassVar[list[TrainStage]] = []

    def wrap(
        self, loaders: Sequence[Iterable[Any]], names: Sequence[str] = ("",)
    ) -> list[StageLoader]:
        """See ``RunStage.wrap``; there is one loader."""
        (self.loader,) = super().wrap(loaders)
        return self.loaders

    @property
    def phase_after(self) -> Phase:
        """See ``RunStage.phase_after``."""
        return Phase.TRAIN_OVER

    @property
    def is_innermost(self) -> bool:
        """Whether it is this run's batch that is being fitted, not one of a run within it."""
        return bool(self._fitting) and self._fitting[-1] is self

    @with_error_context
    def start(self) -> None:
        """Starts the TRAIN stage of the next epoch."""
        brain, epoch = self.brain, self.epoch
        self.is_running = True
        self.run.current = self
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
        """Runs the TRAIN stage of the next epoch by the loop that the recipe has written."""
        assert self.by_recipe is not None
        self.run.current = self
        restart_window(self.brain)
        self.run_state.start_by_recipe()
        self.by_recipe()
        self.run_state.phase = Phase.TRAIN_OVER

    def resume_its_end(self) -> None:
        """Resumes an epoch of which training is over, after ``start``."""
        self.run_state.resume_after_training()
        self.loader.close()
        self._reset()

    def resume_fitted(self) -> Any:
        """Resumes after a batch that was fitted, of which callbacks have not heard.

        Returns:
            Its loss.
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
            batch: What the loader gave.
            fit_batch: Does the work.
            last: Whether the Trainer expects it to be the last of the epoch.
            step: Makes the update of a window whose last batch is skipped, if it can.

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
        """Undoes what a batch has changed for which there was no memory.

        Where patience is exhausted the run is saved and ends, and resumes with this batch.

        Args:
            error: What it has raised; raised again where the run ends.
            batch: What the loader gave.
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
        """Goes on without a batch that is undone: only the number of the step counts it.

        Args:
            error: See ``_undo_or_end``.
            batch: See ``_undo_or_end``.
            step: See ``fit``; None where that has failed.

        Returns:
            A loss that is not finite, for those who want one.
        """
        self._undo_or_end(error, batch)
        self.run.forgive()
        brain, before = self.brain, self.run_state.before
        brain.step = self.step
        if step is None or before.steps:
            # It would have no memory again.
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
            "Out of memory: this batch makes no update (%d of %d forgiven in this epoch). %s",
            before.skipped,
            brain._lightning.oom_patience,
            "; ".join([str(error).partition("\n")[0] or type(error).__name__, *notes(error)]),
        )
        self.steps = brain.optimizer_step - before.counts["optimizer_step"]
        return torch.tensor(torch.nan)

    def _note_save(self, error: Exception, is_shared: bool, is_undone: bool) -> None:
        """Saves the run before the batch, and adds to the error whether that was possible."""
        if not is_shared:
            note = (
                "the run is not saved, for the other processes cannot join. With "
                "oom_patience=0 all of them save and end where one has no memory for a "
                "forward or backward pass"
            )
        elif not is_undone:
            note = (
                "the run is not saved, for an optimizer had begun to step. With "
                "oom_patience=0 that is undone"
            )
        elif self.run.save_after_error():
            note = "the run is saved, and resumes with this batch"
        else:
            note = "the run is not saved"
        add_note(error, f"brain_lightning: {note}")

    @property
    def fitted_batches(self) -> int:
        """``batches``, and the one whose ``on_fit_batch_end`` runs."""
        return self.batches + (self.run_state.phase is Phase.STEPPED)

    @property
    def is_fitted(self) -> bool:
        """Whether there is a batch in hand that has made its update."""
        return self.run_state.phase in (Phase.STEPPED, Phase.FITTED)

    @property
    def uncounted_steps(self) -> int:
        """Steps that the Trainer will count at the end of this batch."""
        return self.steps if self.run_state.phase is Phase.STEPPED else 0

    def stepped(self, loss: Any, steps: int) -> None:
        """Called when the update of a batch is made, before ``on_fit_batch_end``.

        Args:
            loss: Of the batch.
            steps: Steps that the Trainer has not counted.
        """
        self.run_state.loss, self.run_state.phase = loss, Phase.STEPPED
        self._count_steps(steps)

    def _count_steps(self, steps: int) -> None:
        self.steps = steps
        self.accumulates = self.brain.grad_accumulation_factor > 1 and not steps

    def step_metrics(self) -> dict[str, Tensor]:
        """The loss of the last batch by the names that ``LightningModule.log`` gives it.

        Returns:
            Nothing outside of TRAIN, before its first batch, and where a recipe's own
            ``fit_batch`` returns no number.
        """
        fitted = self.is_running and self.batches > self.earlier
        loss = scalar(self.run_state.loss) if fitted else None
        return {} if loss is None else {"train_loss_step": loss, "train_loss": loss}

    def end_batch(self) -> None:
        """Counts a batch of which every callback has heard; may save, or end the run."""
        self.windows += not self.accumulates
        self.run_state.end_batch()
        is_terminated, is_time_to_save = self.run.flags.take(self.brain.device)
        if not self._is_debugged():
            assert self._checkpoints is not None
            self._checkpoints.after_step(is_time_to_save)
            if is_terminated:
                self.run.terminate()

    def is_time_to_save(self) -> bool:
        """Whether a checkpoint within the epoch is due, by the clock of the first process."""
        return self._checkpoints is not None and self._checkpoints.is_time()

    def fetch(self) -> bool:
        """Fetches the next batch.

        Returns:
            Whether there is one, here and on all other ranks.
        """
        fetched = not self._is_debugged() and self.loader.fetch()
        if not self.fetches_collectively or not on_any_rank(not fetched, self.brain.device):
            return fetched
        if fetched:
            logger.warning(
                "Another process has no training batch left after %d: the epoch ends for all.",
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
        # For what the hook saves; and again, for it may report another number by this name.
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
        """Whether there were as many updates as ``optimizer_step_limit`` allows."""
        # A recipe may override it.
        return bool(self.brain._optimizer_step_limit_exceeded)

    def _average(self) -> float:
        return self.brain.avg_train_loss

    def _iterate(self, loader: Iterable[Any], position: int) -> Iterator[Any]:
        return self.run_state.batches(loader)

    def _batches(self, loader: Iterable[Any], position: int) -> Iterator[Any]:
        """``for batch in train_set`` of ``_fit_train``; the Trainer fits where it yields."""
        with self._bar(loader, position) as bar:
            for batch in bar:
                if self.limit_reached():
                    logger.info("Train iteration limit exceeded")
                    return
                yield batch
