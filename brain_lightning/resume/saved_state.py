"""The saved state of a run: the names in the file, and the migration of older files."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypedDict

from torch import Tensor

from brain_lightning.errors import CheckpointError
from brain_lightning.phase import Phase
from brain_lightning.step.window import Window, WindowState

from .plain_values import State

# Version of the file content. Files of brain_lightning 0.1.0 have no version and count as
# version 0. Version 1 has no counts of the parts of an epoch. Version 2 has no accumulation
# window and no count of skipped batches.
VERSION = 3


class BatchState(TypedDict):
    """The state before a batch, in a checkpoint that was saved in the middle of the batch.

    Attributes:
        weights: Parameters by index.
        buffers: Buffers of the modules by index.
        optimizers: States of the optimizers by name.
        scaler: State of the gradient scaler.
        optimizer_step: The Brain's ``optimizer_step``.
    """

    weights: dict[int, Tensor]
    buffers: dict[int, Tensor]
    optimizers: dict[str, State]
    scaler: State
    optimizer_step: int


class EpochState(TypedDict):
    """State of an epoch that is not over.

    Attributes:
        phase: Name of the ``Phase`` at which to resume.
        number: Value that the epoch counter yielded; None if it cannot be saved.
        stage_random: Random state before ``on_stage_start(TRAIN)``; empty before this hook.
        position: Position in the training data.
        batches: Number of fitted batches.
        step: The Brain's ``step``.
        avg_train_loss: The Brain's ``avg_train_loss``.
        nonfinite_count: The Brain's ``nonfinite_count``.
        statistics: Statistics that hooks have accumulated; None before the stage starts.
        gradients: Gradients of an accumulation window that is not full, by parameter index.
        loss: Loss of a fitted batch whose batch-end hooks were not all called; else None.
        before: State to restore before the current batch is fitted again; None between
            batches.
        parts_over: See ``RunProgress``.
        train_part: See ``RunProgress``.
        skipped: Number of batches that were skipped after running out of memory.
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
    """State of one rank.

    Attributes:
        version: Version of the content.
        saved_by: Unique id of the Brain that has saved the state.
        random: Random state to continue with.
        epoch: State of an epoch that is not over, or None.
        epochs: Number of epochs that have started.
        drawn: Number of epochs that the epoch counter has yielded in this run.
        validations: Positions in the validation data.
        between: Position in the training data for the next pass.
        trainer: State of the Trainer.
        end_of_epoch: ``end-of-epoch`` in the meta of the checkpoint; set on recovery.
        buffers: Buffers of this rank that differ from rank 0's, by index.
        synchronizes: Whether the next forward pass of each module broadcasts its buffers.
        beside_weights: State other than weights and optimizers, from when a limit of the
            Trainer ended the epoch before its last batch. Else empty.
        window: Weights of an accumulation window that is not full.
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
    """State before a validation, of everything that the validation changes.

    Attributes:
        epoch: See ``ProcessState``.
        random: See ``ProcessState``.
        validations: See ``ProcessState``.
        synchronizes: See ``ProcessState``.
        window: See ``ProcessState``.
    """

    epoch: EpochState | None
    random: State
    validations: list[State]
    synchronizes: list[bool]
    window: Window


class TrainerSide(Protocol):
    """Interface to the Trainer that a run uses.

    Attributes:
        shows_bar: Whether to show SpeechBrain's bar.
        validates: Whether the run validates.
        saves: Whether the Trainer saves within an epoch if the Brain has no Checkpointer.
        saves_after_fetch: Whether a save may happen after the next batch is fetched and
            before it is fitted.
        saves_within_batch: Whether a save may happen in the middle of a batch.
    """

    shows_bar: bool
    validates: bool
    saves: bool
    saves_after_fetch: bool
    saves_within_batch: bool

    def state(self) -> State:
        """Returns the state of the Trainer to save."""

    def weights(self) -> AbstractContextManager[None]:
        """Context in which the modules have the trained weights, not their average."""

    def measured(self) -> AbstractContextManager[None]:
        """Context in which the modules have the weights that were just validated."""

    def correct(self, checkpoint: State) -> None:
        """Replaces averaged weights in a checkpoint by the trained weights.

        Args:
            checkpoint: Content of a Lightning checkpoint file.
        """

    def remember_trained(self) -> None:
        """Records which parameters are trained when a run starts, before any recovery."""

    def state_beside_weights(self) -> State:
        """Returns the state to save without modules, optimizers and the state of the run."""

    def save_within_epoch(self) -> None:
        """Saves with the Trainer, and replaces its previous checkpoint of this kind."""

    def requeue(self) -> bool:
        """Requeues the job of the scheduler. Saves with the Trainer without a Checkpointer.

        Returns:
            Whether the scheduler has accepted the request.
        """

    def may_call_end_hooks(self) -> bool:
        """Whether batch-end hooks of the last batch are missing, and can be called later."""


def migrated(state: State, end_of_epoch: bool) -> ProcessState:
    """Converts the state of a rank from an older version to the current version.

    Args:
        state: State as it was read.
        end_of_epoch: ``end-of-epoch`` in the meta of the checkpoint.

    Raises:
        CheckpointError: The file has a newer version.
    """
    version = state.get("version", 0)
    if version > VERSION:
        raise CheckpointError(
            "the state of the run was saved by a newer brain_lightning, as version "
            f"{version}, but this release reads versions up to {VERSION}. Upgrade "
            "brain_lightning, or recover a checkpoint that this release has saved."
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
    """Converts version 0, in which only the checkpoint's meta marked the end of an epoch."""
    epoch = None if end_of_epoch else state["epoch"]
    if epoch is not None:
        if state["trainer"]:
            # Version 0 also counted the batches of this epoch.
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
