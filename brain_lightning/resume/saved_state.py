"""What is saved of a run, by the names in the file, and how older files are read."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypedDict

from torch import Tensor

from brain_lightning.errors import CheckpointError
from brain_lightning.phase import Phase
from brain_lightning.step.window import Window, WindowState

from .plain_values import State

# Of the content of a file. Version 0 is that of brain_lightning 0.1.0, which has none;
# version 1 did not count the parts of an epoch, version 2 neither weighed its batches nor
# counted those that were skipped.
VERSION = 3


class BatchState(TypedDict):
    """What a batch had changed when it was saved in its middle, as it was before.

    Attributes:
        weights: Parameters by their index.
        buffers: Buffers of the modules by their index.
        optimizers: The states of optimizers by name.
        scaler: The state of the gradient scaler.
        optimizer_step: The Brain's count of updates.
    """

    weights: dict[int, Tensor]
    buffers: dict[int, Tensor]
    optimizers: dict[str, State]
    scaler: State
    optimizer_step: int


class EpochState(TypedDict):
    """An epoch that is not over.

    Attributes:
        phase: The name of the ``Phase`` at which to resume.
        number: What the epoch counter yielded; None where that cannot be saved.
        stage_random: The random state before ``on_stage_start(TRAIN)``; empty before that.
        position: Of the training data.
        batches: Batches that have been fitted.
        step: The Brain's.
        avg_train_loss: The Brain's.
        nonfinite_count: The Brain's.
        statistics: What hooks have accumulated; None where that is nothing yet.
        gradients: Of an accumulation window that is not full, by the parameter's index.
        loss: Of a batch that is fitted, and of which not every callback has heard.
        before: What to undo of a batch; None outside of one.
        parts_over: See ``RunProgress``.
        train_part: See ``RunProgress``.
        skipped: Batches for which there was no memory.
    """

    phase: str
    number: Any
    stage_random: State
    position: State
    batches: int
    step: int
    avg_train_loss: float
    nonfinite_count: int
    statistics: State | None
    gradients: dict[int, Tensor]
    loss: Tensor | float | None
    before: BatchState | None
    parts_over: int
    train_part: int
    skipped: int


class ProcessState(TypedDict):
    """The state of one process.

    Attributes:
        version: Of this content.
        saved_by: Which Brain has saved it.
        random: The random state to go on with.
        epoch: The epoch that is not over.
        epochs: The number of epochs that have begun.
        drawn: The number of epochs that the epoch counter has yielded in this run.
        validations: The positions in the validation data.
        between: The position in the training data, for the next pass over it.
        trainer: The Trainer's.
        end_of_epoch: What the checkpoint's meta says; known when it is recovered.
        buffers: Those of this process, by their index, where they differ from the first one's.
        synchronizes: Whether modules make their buffers the first one's when they are called.
        beside_weights: What to recover beside weights and optimizers, as it was when a limit
            of the Trainer's had ended the epoch in its middle; empty where none has.
        window: The weights of an accumulation window that is not full.
    """

    version: int
    saved_by: str
    random: State
    epoch: EpochState | None
    epochs: int
    drawn: int
    validations: list[State]
    between: State
    trainer: State
    end_of_epoch: bool
    buffers: dict[int, Tensor]
    synchronizes: list[bool]
    beside_weights: State
    window: WindowState


class Moment(NamedTuple):
    """What a validation changes, or hides, as it was before.

    Attributes:
        epoch: See ``ProcessState``, and for all others.
        random: The random state.
        validations: The positions in the validation data.
        synchronizes: Of modules.
        window: Of accumulation.
    """

    epoch: EpochState | None
    random: State
    validations: list[State]
    synchronizes: list[bool]
    window: Window


class TrainerSide(Protocol):
    """What the Trainer's side gives to a run.

    Attributes:
        shows_bar: Whether SpeechBrain's bar is to be shown.
        validates: Whether there is a validation.
        saves: Whether the Trainer is to save within an epoch, where the Brain has no
            Checkpointer.
        draws_ahead: Whether something may save when the next batch is fetched.
        saves_within_batch: Whether something may save in the middle of a batch.
    """

    shows_bar: bool
    validates: bool
    saves: bool
    draws_ahead: bool
    saves_within_batch: bool

    def state(self) -> State:
        """What there is to save of the Trainer."""

    def weights(self) -> AbstractContextManager[None]:
        """A context in which the weights are those that are trained, not an average."""

    def measured(self) -> AbstractContextManager[None]:
        """A context in which the weights are those that a validation has just measured."""

    def correct(self, checkpoint: State) -> None:
        """Exchanges an average for the weights in what is saved.

        Args:
            checkpoint: The content of a Lightning file.
        """

    def remember_trained(self) -> None:
        """Remembers what is trained when a run starts, before anything is recovered."""

    def state_beside_weights(self) -> State:
        """Everything that is saved but modules, optimizers and the state of the run."""

    def save_within_epoch(self) -> None:
        """Saves with the Trainer, and replaces what it has saved before."""

    def requeue(self) -> bool:
        """Requeues the job of a scheduler, which finds what the Trainer saves for it.

        Returns:
            Whether the scheduler has agreed.
        """

    def is_telling_of_batch(self) -> bool:
        """Whether some callback has not heard that the last batch is over, and yet can."""


def migrated(state: State, end_of_epoch: bool) -> ProcessState:
    """The state of a process, from a file of this version or of an older one.

    Args:
        state: As it was read.
        end_of_epoch: What the checkpoint's meta says.

    Raises:
        CheckpointError: The file is of a newer version.
    """
    version = state.get("version", 0)
    if version > VERSION:
        raise CheckpointError(
            "the state of the run was saved by a newer brain_lightning, as version "
            f"{version}, and this one reads versions up to {VERSION}: upgrade "
            "brain_lightning, or recover a checkpoint that this one has saved"
        )
    if version == 0:
        state = _from_version_0(state, end_of_epoch)
    if version < 2 and state["epoch"] is not None:
        state["epoch"] |= {"parts_over": 0, "train_part": 0}
    if version < 3:
        state |= {"window": Window().state()}
        if state["epoch"] is not None:
            state["epoch"] |= {"skipped": 0}
    return {**state, "end_of_epoch": end_of_epoch}  # type: ignore[typeddict-item]


def _from_version_0(state: State, end_of_epoch: bool) -> State:
    """In 0.1.0 the end of an epoch was known by the checkpoint's meta alone."""
    epoch = None if end_of_epoch else state["epoch"]
    if epoch is not None:
        if state["trainer"]:
            # It counted those of this epoch as well.
            state["trainer"]["progress"]["batches"] -= epoch["position"]["batches"]
        phase = Phase.FETCHED if epoch.pop("validated") else Phase.BATCH_OVER
        epoch = {
            **epoch,
            "phase": phase.name,
            "number": None,
            "batches": epoch["position"]["batches"],
            "statistics": epoch.pop("gathered"),
            "loss": None,
            "before": None,
        }
    new: State = {"buffers": {}, "synchronizes": [], "beside_weights": {}}
    return {**state, **new, "version": VERSION, "epoch": epoch}
