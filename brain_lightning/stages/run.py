"""One run of a Brain: the state that its stages share, its start and its end.

``train.py`` and ``evaluation.py`` together correspond to ``speechbrain.Brain._fit_train``,
``_fit_valid`` and ``evaluate``, divided into the steps that Lightning's hooks call.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch

from brain_lightning.distributed.batch_flags import BatchFlags
from brain_lightning.distributed.termination import EXIT_STATUS, Termination
from brain_lightning.phase import Phase
from brain_lightning.protocol import BrainProtocol
from brain_lightning.resume.run_state import RunState
from brain_lightning.resume.saved_state import TrainerSide
from brain_lightning.temporary import TemporaryAttributes

from .base import RunStage
from .epochs import Epochs
from .error_context import add_context
from .evaluation import TestStage, ValidStage
from .metrics import Metrics, record
from .train import TrainStage

logger = logging.getLogger(__name__)


def is_last_epoch(brain: BrainProtocol, epoch: Any) -> bool:
    """Whether ``speechbrain.Brain.fit`` ends after an epoch, even if its counter has more.

    Args:
        brain: The Brain after training and validation.
        epoch: Number of the epoch.
    """
    debugged = brain.debug and epoch == brain.debug_epochs
    return debugged or bool(brain._optimizer_step_limit_exceeded)


class Parts(Protocol):
    """Runs single stages, for recipes that call ``_fit_train`` and ``_fit_valid``."""

    @property
    def may_train(self) -> bool:
        """Whether a TRAIN stage may start."""

    @property
    def may_valid(self) -> bool:
        """Whether a VALID stage may start."""

    def train(self, train_set: Any, epoch: Any, enable: bool) -> None:
        """Runs one TRAIN stage.

        Args:
            train_set: Iterable of batches.
            epoch: Number of the epoch.
            enable: Whether to show a bar.
        """

    def valid(self, valid_set: Any, epoch: Any, enable: bool) -> None:
        """Runs one VALID stage.

        Args:
            valid_set: Iterable of batches. If it is None, nothing is validated.
            epoch: Number of the epoch.
            enable: Whether to show a bar.
        """

    def is_over(self) -> bool:
        """Whether the Trainer has ended the training. Called between two epochs."""


class Run:
    """One ``fit`` or one ``evaluate`` of a Brain.

    Args:
        brain: The Brain that runs.
        epochs: Epochs of the run.
        run_state: State of the run that is saved in checkpoints.
        best_keys: Arguments of ``on_evaluate_start``.

    Attributes:
        grad_enabled: Whether gradients were enabled when the run was created.
        train: TRAIN stage.
        valid: VALID stage.
        test: TEST stage.
        current: Stage that is running or ran last.
        trainer: Interface to the Trainer, set by ``begin``.
        parts: Runs the stages one by one; None outside of ``fit``.
        flags: Flags of a training batch that all ranks share, set by ``begin``.
        termination: Handles SIGTERM, and the signal that requeues the job.
        interrupt: KeyboardInterrupt that ended the run. Lightning raises SystemExit instead.
        metrics: Metrics that the stages reported.
        temporary: Records the changes that are undone when the run is closed.
    """

    trainer: TrainerSide
    flags: BatchFlags
    parts: Parts | None = None
    # Runs that have started and not ended. An inner run comes after its outer run.
    _running: ClassVar[list[Run]] = []

    def __init__(
        self,
        brain: BrainProtocol,
        epochs: Epochs,
        run_state: RunState,
        best_keys: Mapping[str, str | None] = {},
    ) -> None:
        self.brain = brain
        self.epochs = epochs
        self.run_state = run_state
        self.best_keys = best_keys
        # Lightning disables gradients before the hook in which an evaluation stage starts.
        self.grad_enabled = torch.is_grad_enabled()
        self.train = TrainStage(self)
        self.valid = ValidStage(self)
        self.test = TestStage(self)
        self.current: RunStage = self.train
        self.metrics = Metrics(lambda: self.current.kind)
        self.termination = Termination()
        self.interrupt: KeyboardInterrupt | None = None
        self.temporary = TemporaryAttributes()
        # The id of the error that was located last. A reference would keep its frames alive.
        self._located: int | None = None

    @classmethod
    def is_running(cls, brain: BrainProtocol) -> bool:
        """Whether a Brain is in a run, so that a new run of this Brain is nested.

        Args:
            brain: The Brain.
        """
        return any(run.brain is brain for run in cls._running)

    @classmethod
    def parts_of(cls, brain: BrainProtocol) -> Parts | None:
        """Returns ``parts`` of the innermost run of a Brain, or None without a run.

        Args:
            brain: The Brain.
        """
        runs = [run for run in cls._running if run.brain is brain]
        return runs[-1].parts if runs else None

    def begin(self, trainer: TrainerSide) -> None:
        """Begins the run. It lasts until ``close``.

        Args:
            trainer: Interface to the Trainer.
        """
        self.trainer = self.run_state.trainer = trainer
        self._running.append(self)
        self.flags = BatchFlags(self.train.flags_of_rank)
        self.temporary.set(self.brain._lightning, "flags", self.flags)

    def close(self) -> None:
        """Ends the run and every pass over its data, and undoes temporary changes."""
        if self in self._running:
            self._running.remove(self)
        for stage in (self.train, self.valid, self.test):
            stage.close()
        self.temporary.restore()

    def take_metrics(self, from_all_ranks: bool) -> dict[str, float]:
        """Takes the metrics of the stages, and updates the Brain's record of best values.

        Args:
            from_all_ranks: See ``Metrics.take``.

        Returns:
            See ``Metrics.take``.
        """
        found = self.metrics.take(from_all_ranks)
        if not any(run is not self and run.brain is self.brain for run in self._running):
            record(self.brain._lightning.records, found, self.current.epoch)
        return found

    def start_epoch(self) -> None:
        """Starts the epoch that the epoch counter yielded, before any hook is called."""
        self.run_state.start_epoch(self.epochs.start())

    def finish_epoch(self) -> None:
        """Ends an epoch, after the epoch-end hooks of all callbacks were called."""
        self.run_state.phase = Phase.EPOCH_OVER
        self.train.earlier = self.train.batches

    def end_epoch(self) -> None:
        """Decides after validation whether another epoch may follow."""
        self.run_state.phase = Phase.VALID_OVER
        if is_last_epoch(self.brain, self.epochs.current):
            self.epochs.stop()

    def save_within_epoch(self) -> None:
        """Saves a checkpoint now, with the Brain's Checkpointer or with the Trainer."""
        if self.brain.checkpointer is not None:
            self.brain._save_intra_epoch_ckpt()
        elif self.trainer.saves:
            self.trainer.save_within_epoch()

    @property
    def saves(self) -> bool:
        """Whether a Checkpointer or the Trainer can save within an epoch."""
        return self.brain.checkpointer is not None or self.trainer.saves

    def save_after_error(self) -> bool:
        """Saves the current state of the run before an error ends it.

        Returns:
            Whether the run was saved. A failure is logged, so that it does not hide the
            error that ends the run.
        """
        if not self.saves:
            return False
        try:
            with self.trainer.weights():
                self.save_within_epoch()
        except Exception:
            logger.exception("Could not save the run after the error that ends it.")
            return False
        return True

    def cut_short(self) -> None:
        """Saves the run when a limit of the Trainer ends the epoch before its last batch."""
        if self.saves:
            self.save_within_epoch()
            self.run_state.cut_short()

    def end_if_terminated(self) -> None:
        """Saves the run and exits if any rank received a signal to do so.

        Called between two batches on all ranks. If the signal requests to requeue the job,
        and this fails, the run continues.

        Raises:
            SystemExit: The run ends, with a nonzero exit status.
        """
        signum = self.termination.requested(self.brain.device)
        if signum is None:
            return
        with self.trainer.weights(), TemporaryAttributes() as temporary:
            for name, value in self.run_state.counts.items():
                temporary.set(self.brain, name, value)
            self.save_within_epoch()
            requeues = signum != signal.SIGTERM
            if requeues and not self.trainer.requeue():
                self.termination.forget(signum)
                return
        self.termination.acknowledge()
        logger.warning(
            "Received %s: the run %s within epoch %s, and ends.",
            signal.Signals(signum).name,
            "was saved" if self.saves or requeues else "was not saved",
            self.epochs.current,
        )
        raise SystemExit(EXIT_STATUS)

    def forget_error(self) -> None:
        """Continues after an error. A later error may have the same id."""
        self._located = None

    def locate(self, error: Exception, batch: Any = None, next_is: str = "") -> None:
        """Adds the stage, epoch, step and batch to an error, once per error.

        Args:
            error: The error.
            batch: Current batch.
            next_is: Operation on the next batch, such as ``fetching batch``, if the error
                comes before the step of that batch. Else an empty string.
        """
        if id(error) == self._located:
            return
        self._located = id(error)
        stage, number = self.current, self.brain.step + bool(next_is)
        step = f"{next_is or 'step'} {number}" if number else ""
        add_context(error, stage.kind, stage.epoch, step, batch, self.brain.device)
