"""The progress of a run: its phase, its counts, and the state to save at each phase."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from brain_lightning.distributed.communication import world_size
from brain_lightning.fsdp2.evaluate import release
from brain_lightning.phase import Phase
from brain_lightning.protocol import BrainProtocol
from brain_lightning.step.window import Window, restore_window, window_of
from brain_lightning.temporary import TemporaryAttributes

from .before_batch import COUNTS, BeforeBatch, gradients, on_cpu, restore_gradients, undo
from .data_position import DataPosition, position_in, recovered_batches
from .epoch_statistics import EpochStatistics
from .plain_values import State, plain, plain_or_none
from .position import Position
from .process_state import (
    buffers,
    full_on_main,
    restore_buffers,
    restore_synchronizes,
    synchronizes,
)
from .random_state import random_state, set_random_state
from .saved_state import VERSION, EpochState, Moment, ProcessState, TrainerSide

logger = logging.getLogger(__name__)


class RunProgress:
    """The progress of a run of a Brain, from which it can be resumed.

    The stages of the run set its ``phase``. The saved state follows from the phase: the
    random states, the position in the data, the gradients of an accumulation window that is
    not full, and the statistics of the epoch. A recovered state takes effect when the next
    epoch starts, because the hooks before its first batch are called again.

    Args:
        brain: The Brain that runs.

    Attributes:
        phase: Which steps of the epoch are complete.
        position: Position in the training data.
        before: State before the current batch.
        trainer: Interface to the Trainer; None before the run begins.
        epochs: Number of epochs that have started.
        drawn: Number of epochs that the epoch counter has yielded in this run, without an
            epoch that it had yielded before the run was resumed.
        number: Value that the epoch counter yielded last.
        loss: Loss of the last fitted batch.
        validations: Positions in the validation data.
        resumed: Recovered state that has not taken effect yet.
        explicit: Whether ``resumed`` is from a file that the user named. Then its epochs are
            over, even if the epoch counter was not restored.
        has_recovered_counts: Whether ``on_fit_start`` has changed the counts of the Brain.
        parts_over: Number of calls of ``_fit_train`` and ``_fit_valid`` that are over in the
            epoch, if a recipe calls them itself.
        train_part: Value of ``parts_over`` before the last ``_fit_train``.
    """

    def __init__(self, brain: BrainProtocol) -> None:
        self.brain = brain
        self._saved_by = uuid.uuid4().hex
        self.begin()

    def begin(self) -> None:
        """Begins a run."""
        self.phase = Phase.EPOCH_OVER
        self.position: Position = DataPosition()
        self.before = BeforeBatch(self.brain)
        self.trainer: TrainerSide | None = None
        self.epochs = self.drawn = 0
        self.number: Any = None
        self.loss: Any = None
        self.resumed: ProcessState | None = None
        self.explicit = False
        self.has_recovered_counts = False
        self.parts_over = self.train_part = 0
        self.validations: list[Position] = []
        self._resumed_validations: dict[int, State] = {}
        self._statistics = EpochStatistics(self.brain)
        self._stage_random: State = {}
        # Counts of TRAIN, while a validation overwrites the counts of the Brain.
        self._counts: State = {}
        self._before_validation: Moment | None = None
        # State at which a limit of the Trainer has ended an epoch before its last batch.
        self._cut_short: ProcessState | None = None

    @contextmanager
    def entering(self, phase: Phase, parts: int = 0) -> Iterator[None]:
        """Context in which a hook that completes a phase is called.

        Args:
            phase: Phase after the hook. Saves within the hook use it. If the hook fails, the
                previous phase is restored, so that a resumed run calls the hook again.
            parts: Number of parts of the epoch that the hook completes.

        Yields:
            None
        """
        before, self.phase = self.phase, phase
        self.parts_over += parts
        try:
            yield
        except BaseException:
            self.phase = before
            self.parts_over -= parts
            raise

    # ----------------------------------------------------------------- resuming

    @property
    def resumed_epoch(self) -> EpochState | None:
        """State of the epoch to resume; None if the run resumes between epochs."""
        return None if self.resumed is None else self.resumed["epoch"]

    @property
    def resumed_phase(self) -> Phase | None:
        """Phase of the epoch to resume, or None."""
        return None if self.resumed_epoch is None else Phase[self.resumed_epoch["phase"]]

    def start_epoch(self, number: Any) -> None:
        """Starts an epoch, before any hook is called.

        Args:
            number: Value that the epoch counter yielded.
        """
        self.epochs += 1
        self.drawn += 1
        self.number, self._stage_random, self._cut_short = number, {}, None
        self.phase = Phase.STARTING
        resumed, epoch = self.resumed, self.resumed_epoch
        if resumed is not None and (epoch is None or not epoch["stage_random"]):
            set_random_state(resumed["random"])

    def start_training(self, loader: Any) -> None:
        """Starts TRAIN, before ``on_stage_start`` is called.

        Args:
            loader: Loader that ``fit`` got.
        """
        resumed, epoch = self.resumed, self.resumed_epoch
        self.position = position_in(loader, self.position)
        if resumed is not None:
            state = resumed["between"] if epoch is None else epoch["position"]
            self.position.resume(state, loader)
        if epoch is not None and epoch["stage_random"]:
            set_random_state(epoch["stage_random"])
        starts = epoch is None and not recovered_batches(loader)
        if self.has_recovered_counts and (starts or self.resumed_phase is Phase.TRAIN_OVER):
            # The recovered counts are from the end of TRAIN.
            self.brain.step, self.brain.avg_train_loss = 0, 0.0
        self._stage_random, self._counts = random_state(), {}
        self._statistics = EpochStatistics(self.brain)
        self.before.is_distributed, self.before.skipped = world_size() > 1, 0

    def batches(self, loader: Any) -> Iterator[Any]:
        """Yields the batches of the current epoch from its position on.

        Args:
            loader: Loader that ``fit`` got.

        Yields:
            The batches.
        """
        self._begin_batches()
        yield from self.position.begin(loader)

    def start_by_recipe(self) -> None:
        """Starts a TRAIN stage with a custom loop of the recipe."""
        self.resumed = None
        self._statistics = EpochStatistics(self.brain)

    def resume_after_training(self) -> None:
        """Resumes an epoch whose training is over."""
        resumed = self.resumed
        assert resumed is not None
        self._begin_batches()
        set_random_state(resumed["random"])

    def resume_after_validation(self, loader: Any) -> None:
        """Resumes an epoch whose training and validation are over.

        Args:
            loader: Loader that ``fit`` got.
        """
        assert self.resumed is not None
        assert self.resumed_epoch is not None
        self.position = position_in(loader, self.position)
        self.position.resume(self.resumed["between"], loader)
        set_random_state(self.resumed["random"])
        self.position.fitted = self.resumed_epoch["batches"]
        self._resume_processes()
        self.resumed, self.phase = None, Phase.VALID_OVER

    def _begin_batches(self) -> None:
        self._statistics.begin()
        self._resume_processes()
        epoch, self.resumed = self.resumed_epoch, None
        self.phase = Phase.FETCHED
        if epoch is not None:
            self._resume_epoch(epoch)

    def _resume_processes(self) -> None:
        """Restores the state of this rank, which wrapping has replaced by rank 0's."""
        if self.resumed is not None:
            restore_buffers(self.brain, self.resumed["buffers"])
            restore_synchronizes(self.brain, self.resumed["synchronizes"])
            restore_window(self.brain, self.resumed["window"])

    def _resume_epoch(self, epoch: EpochState) -> None:
        brain = self.brain
        self.phase = Phase.FETCHED if epoch["phase"] == "STARTING" else Phase[epoch["phase"]]
        self.loss, self.position.fitted = epoch["loss"], epoch["batches"]
        self.before.skipped = epoch["skipped"]
        for name in COUNTS:
            setattr(brain, name, epoch[name])  # type: ignore[literal-required]
        if epoch["statistics"] is not None:
            self._statistics.restore(epoch["statistics"])
        restore_gradients(brain, epoch["gradients"])
        if epoch["before"] is not None:
            undo(brain, epoch["before"])

    # ----------------------------------------------------------------- a batch

    def begin_batch(self) -> None:
        """Copies the state that the next batch will change."""
        self.before.count()
        if self.trainer is not None and self.trainer.saves_within_batch:
            self.before.copy(self._statistics)
        self.phase = Phase.FITTING

    def end_batch(self) -> None:
        """Counts a batch after all its batch-end hooks were called."""
        self.before.forget()
        self.position.count()
        self.phase = Phase.BATCH_OVER

    def cut_short(self) -> None:
        """Copies the state between two batches, for all saves until the next epoch.

        Called when a limit of the Trainer ends the epoch before its last batch. Then the hooks
        at the end of the epoch are called. A checkpoint that they save resumes at this batch.
        """
        assert self.trainer is not None
        beside_weights = self.trainer.state_beside_weights()
        state = full_on_main(self.state())
        self._cut_short = plain({**state, "beside_weights": beside_weights})

    # ------------------------------------------------------- TRAIN ends, VALID

    def end_training(self) -> None:
        """Copies the state that ``on_stage_end(TRAIN)`` may change."""
        self._counts = self.counts
        self._statistics.end()

    def begin_validation(self) -> None:
        """Copies the state that a validation changes. It may be in the middle of an epoch."""
        epoch = self._epoch()
        self._before_validation = Moment(
            epoch,
            random_state(),
            self._validations(),
            synchronizes(self.brain),
            self._window(),
        )
        self._counts = self.counts
        self.phase = Phase.VALIDATING

    def keep_train_counts(self, step: int) -> None:
        """Copies the counts of TRAIN before a hook of TRAIN validates.

        Args:
            step: Step of the current batch. The hook may have changed the Brain's ``step``.
        """
        self._counts = {**self.counts, "step": step}

    def end_validation(self) -> None:
        """Uses the counts of the Brain again, after a validation in the middle of TRAIN."""
        self._counts = {}

    def validation_batches(self, loader: Any, index: int) -> Iterator[Any]:
        """Returns the batches of a validation, from a position that is saved and resumed.

        Args:
            loader: Loader that ``fit`` got.
            index: Index of the loader, if there are several.

        Returns:
            The batches.
        """
        while len(self.validations) <= index:
            self.validations.append(DataPosition())
        self.validations[index] = position_in(loader, self.validations[index])
        if index in self._resumed_validations:
            self.validations[index].resume(self._resumed_validations.pop(index), loader)
        return self.validations[index].batches(loader)

    @property
    def counts(self) -> State:
        """Counts of the Brain in TRAIN, also within a validation."""
        # SpeechBrain's Brain has no nonfinite_count before it trains.
        return self._counts or {name: getattr(self.brain, name, 0) for name in COUNTS}

    # ------------------------------------------------------------------ saving

    @property
    def is_end_of_epoch(self) -> bool:
        """Whether training and validation of the last epoch are over."""
        return (
            self.phase in (Phase.EPOCH_OVER, Phase.VALID_OVER) and self.resumed_epoch is None
        )

    def state(self) -> ProcessState:
        """Returns the state of this rank."""
        release(self.brain)
        of_trainer = {} if self.trainer is None else self.trainer.state()
        if self.resumed is not None:
            # The recovered state has not taken effect.
            return {**self.resumed, "saved_by": self._saved_by, "trainer": of_trainer}
        if self._cut_short is not None:
            return self._cut_short
        moment = self._before_validation if self.phase is Phase.VALIDATING else None
        return {
            "version": VERSION,
            "saved_by": self._saved_by,
            "random": random_state() if moment is None else moment.random,
            "epoch": self._epoch() if moment is None else moment.epoch,
            "epochs": self.epochs,
            "drawn": self.drawn,
            "validations": self._validations() if moment is None else moment.validations,
            "between": self.position.state_between_passes(),
            "trainer": of_trainer,
            "end_of_epoch": self.is_end_of_epoch,
            "buffers": buffers(self.brain),
            "synchronizes": self._synchronizes() if moment is None else moment.synchronizes,
            "beside_weights": {},
            "window": (self._window() if moment is None else moment.window).state(),
        }

    def _synchronizes(self) -> list[bool]:
        before = self.phase is Phase.FITTING
        return self.before.synchronizes if before else synchronizes(self.brain)

    def _window(self) -> Window:
        return self.before.window if self.phase is Phase.FITTING else window_of(self.brain)

    def _validations(self) -> list[State]:
        states = dict(enumerate(each.state_between_passes() for each in self.validations))
        states |= self._resumed_validations
        return [states[index] for index in sorted(states)]

    def _epoch(self) -> EpochState | None:
        """Returns the state of the epoch outside of a validation; None between epochs."""
        phase = self.phase
        if phase is Phase.EPOCH_OVER:
            return None
        if phase is Phase.FITTING:
            return self._epoch_before_batch()
        if phase in (Phase.STEPPED, Phase.FITTED):
            return self._epoch_after_fit()
        if phase in (Phase.FETCHED, Phase.BATCH_OVER, Phase.VALIDATED):
            return self._epoch_between_batches()
        if phase is Phase.TRAIN_OVER and self._statistics.has_unsaved_after_end():
            # on_stage_end has to be called again when the run is resumed.
            return {**self._epoch_between_batches(), "phase": Phase.BATCH_OVER.name}
        return self._epoch_without_batches()

    def _epoch_without_batches(self) -> EpochState:
        """Returns the state before the first batch or after the last one."""
        starting = self.phase is Phase.STARTING
        position = {**self.position.state_between_passes(), "batches": 0}
        statistics = None if starting else self._statistics.state()
        return {
            **self._epoch_at(position, 0 if starting else self.position.fitted, statistics),
            "nonfinite_count": 0 if starting else self.counts["nonfinite_count"],
        }

    def _epoch_between_batches(
        self, fitted: int | None = None, before: BeforeBatch | None = None
    ) -> EpochState:
        """Returns the state after ``fitted`` batches, now or from the copy ``before``."""
        fitted = self.position.fitted if fitted is None else fitted
        random = random_state() if before is None else before.random
        grads = gradients(self.brain) if before is None else before.gradients
        statistics = self._statistics.state(None if before is None else before.statistics)
        return {
            **self._epoch_at(self.position.state(fitted, random), fitted, statistics),
            **self.counts,  # type: ignore[typeddict-item]
            "gradients": on_cpu(grads),
        }

    def _epoch_at(self, position: State, batches: int, statistics: State | None) -> EpochState:
        return {
            "phase": self.phase.name,
            "number": plain_or_none(self.number),
            "stage_random": self._stage_random,
            "position": position,
            "batches": batches,
            "step": 0,
            "avg_train_loss": 0.0,
            "nonfinite_count": 0,
            "statistics": statistics,
            "gradients": {},
            "loss": None,
            "before": None,
            "parts_over": self.parts_over,
            "train_part": self.train_part,
            "skipped": self.before.skipped,
        }

    def _epoch_before_batch(self) -> EpochState:
        """Returns the state before an unfinished batch, which is fitted again on resume."""
        before, complete = self.before, self.before.complete_or_none()
        return {
            **self._epoch_between_batches(before=complete),
            "phase": Phase.FETCHED.name,
            **{name: before.counts[name] for name in COUNTS},  # type: ignore[typeddict-item]
            "before": None if complete is None else complete.state(),
        }

    def _epoch_after_fit(self) -> EpochState:
        """Returns the state after a fitted batch, whose missing hooks are called on resume."""
        brain, loss, average = self.brain, self.loss, self.brain.avg_train_loss
        if self.phase is Phase.STEPPED:
            loss = loss.detach().cpu() if isinstance(loss, Tensor) else loss
            with TemporaryAttributes() as temporary:
                # A hook that validates has set brain.step to 0.
                temporary.set(brain, "step", self.counts["step"])
                average = brain.update_average(loss, average)
        again = self.trainer is not None and self.trainer.may_call_end_hooks()
        return {
            **self._epoch_between_batches(self.position.fitted + (not again)),
            "phase": (Phase.FITTED if again else Phase.BATCH_OVER).name,
            "avg_train_loss": average,
            "loss": plain_or_none(loss) if again else None,
        }
