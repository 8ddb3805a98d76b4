"""One run of a Brain: what its stages share, and how it begins and ends.

Read together, ``train.py`` and ``evaluation.py`` are ``speechbrain.Brain._fit_train``,
``_fit_valid`` and ``evaluate``, cut where Lightning calls.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch

from brain_lightning.distributed.batch_flags import BatchFlags
from brain_lightning.distributed.communication import on_any_rank
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
    """Whether ``speechbrain.Brain.fit`` ends with an epoch, whatever its counter says.

    Args:
        brain: The Brain after training and validation.
        epoch: The number of the epoch.
    """
    debugged = brain.debug and epoch == brain.debug_epochs
    return debugged or bool(brain._optimizer_step_limit_exceeded)


class Parts(Protocol):
    """``_fit_train`` and ``_fit_valid``: a run stage by stage, as a recipe asks for them."""

    @property
    def may_train(self) -> bool:
        """Whether a TRAIN stage may begin."""

    @property
    def may_valid(self) -> bool:
        """Whether a VALID stage may begin."""

    def train(self, train_set: Any, epoch: Any, enable: bool) -> None:
        """One TRAIN stage.

        Args:
            train_set: Iterable over batches.
            epoch: The number of the epoch.
            enable: Whether to show a bar.
        """

    def valid(self, valid_set: Any, epoch: Any, enable: bool) -> None:
        """One VALID stage.

        Args:
            valid_set: Iterable over batches; None validates nothing.
            epoch: The number of the epoch.
            enable: Whether to show a bar.
        """

    def is_over(self) -> bool:
        """Whether the Trainer has ended the training; called between two epochs."""


class Run:
    """One ``fit`` or one ``evaluate`` of a Brain.

    Args:
        brain: The Brain that runs.
        epochs: Its epochs.
        run_state: What is saved of the run.
        best_keys: Arguments of ``on_evaluate_start``.

    Attributes:
        grad_enabled: Whether gradients were enabled when the run was made.
        train: Its TRAIN stage.
        valid: Its VALID stage.
        test: Its TEST stage.
        current: The stage that is running or ran last.
        trainer: The Trainer's side, from ``begin`` on.
        parts: Its stages one by one; None where it does not fit.
        flags: What all processes share of a training batch, from ``begin`` on.
        termination: Handles SIGTERM, and the signal that the job is requeued by.
        interrupt: The Ctrl-C that ended the run, of which Lightning makes a SystemExit.
        metrics: The numbers that the stages found.
        temporary: Records what is changed until the run is closed.
    """

    trainer: TrainerSide
    flags: BatchFlags
    parts: Parts | None = None
    # Runs that have begun and not ended.
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
        # Lightning disables gradients before it calls the hook in which a stage starts.
        self.grad_enabled = torch.is_grad_enabled()
        self.train = TrainStage(self)
        self.valid = ValidStage(self)
        self.test = TestStage(self)
        self.current: RunStage = self.train
        self.metrics = Metrics(lambda: self.current.kind)
        self.termination = Termination()
        self.interrupt: KeyboardInterrupt | None = None
        self.temporary = TemporaryAttributes()
        # The error that was located last, by its id: it must not be kept.
        self._located: int | None = None

    @classmethod
    def is_running(cls, brain: BrainProtocol) -> bool:
        """Whether a Brain is in a run, so that one that begins is within it.

        Args:
            brain: The Brain.
        """
        return any(run.brain is brain for run in cls._running)

    @classmethod
    def parts_of(cls, brain: BrainProtocol) -> Parts | None:
        """The stages, one by one, of the innermost run of a Brain.

        Args:
            brain: The Brain.
        """
        runs = [run for run in cls._running if run.brain is brain]
        return runs[-1].parts if runs else None

    def begin(self, trainer: TrainerSide) -> None:
        """Begins the run, which lasts until ``close``.

        Args:
            trainer: The Trainer's side.
        """
        self.trainer = self.run_state.trainer = trainer
        self._running.append(self)
        self.flags = BatchFlags(self._flags)
        self.temporary.set(self.brain._lightning, "flags", self.flags)

    def _flags(self) -> tuple[bool, bool]:
        """Of this process: whether it is to end, and whether it is time to save."""
        return self.termination.is_requested, self.train.is_time_to_save()

    def close(self) -> None:
        """Ends the run, and every pass over data."""
        if self in self._running:
            self._running.remove(self)
        for stage in (self.train, self.valid, self.test):
            stage.close()
        self.temporary.restore()

    def take_metrics(self, from_all_ranks: bool) -> dict[str, float]:
        """Takes the numbers that the stages found, and keeps the best of each for the Brain.

        Args:
            from_all_ranks: As for ``Metrics.take``.

        Returns:
            As ``Metrics.take``.
        """
        found = self.metrics.take(from_all_ranks)
        if not any(run is not self and run.brain is self.brain for run in self._running):
            record(self.brain._lightning.records, found, self.current.epoch)
        return found

    def start_epoch(self) -> None:
        """Starts the epoch that the epoch counter has yielded, before any hook hears of it."""
        self.run_state.start_epoch(self.epochs.start())

    def finish_epoch(self) -> None:
        """Ends an epoch of which every callback has heard."""
        self.run_state.phase = Phase.EPOCH_OVER
        self.train.earlier = self.train.batches

    def end_epoch(self) -> None:
        """Decides, after validation, whether another epoch may follow."""
        self.run_state.phase = Phase.VALID_OVER
        if is_last_epoch(self.brain, self.epochs.current):
            self.epochs.stop()

    def save_within_epoch(self) -> None:
        """Saves now, with the Brain's Checkpointer or the Trainer."""
        if self.brain.checkpointer is not None:
            self.brain._save_intra_epoch_ckpt()
        elif self.trainer.saves:
            self.trainer.save_within_epoch()

    @property
    def saves(self) -> bool:
        """Whether there is something to save with within an epoch."""
        return self.brain.checkpointer is not None or self.trainer.saves

    def save_after_error(self) -> bool:
        """Saves where the run is, for an error is going to end it.

        Returns:
            Whether it is saved. What goes wrong is logged, and does not hide that error.
        """
        if not self.saves:
            return False
        try:
            with self.trainer.weights():
                self.save_within_epoch()
        except Exception:
            logger.exception("The run could not be saved after the error that ends it.")
            return False
        return True

    def cut_short(self) -> None:
        """Saves where the run is: a limit of the Trainer's ends the epoch in its middle."""
        if self.saves:
            self.save_within_epoch()
            self.run_state.cut_short()

    def end_if_terminated(self) -> None:
        """Asks all processes for a signal to end, and does so; called between two batches.

        Raises:
            SystemExit: See ``terminate``.
        """
        if self.termination.is_installed and on_any_rank(
            self.termination.is_requested, self.brain.device
        ):
            self.terminate()

    def terminate(self) -> None:
        """Saves and ends the process after a signal to do so.

        Without success in requeuing its job it goes on.

        Raises:
            SystemExit: With a status that is not zero.
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
            "%s: the run is %s, within epoch %s, and ends.",
            signal.Signals(signum).name,
            "saved" if self.saves or requeues else "not saved",
            self.epochs.current,
        )
        raise SystemExit(EXIT_STATUS)

    def forgive(self) -> None:
        """Goes on after an error: the next one may have its id."""
        self._located = None

    def locate(self, error: Exception, batch: Any = None, next_is: str = "") -> None:
        """Adds to an error which stage, epoch, step and batch it comes from, once.

        Args:
            error: The error.
            batch: The batch in hand.
            next_is: What is done with the next batch, where it is before its step.
        """
        if id(error) == self._located:
            return
        self._located = id(error)
        stage, number = self.current, self.brain.step + bool(next_is)
        step = f"{next_is or 'step'} {number}" if number else ""
        add_context(error, stage.kind, stage.epoch, step, batch, self.brain.device)
