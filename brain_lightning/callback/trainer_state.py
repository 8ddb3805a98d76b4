"""What a Trainer needs to resume exactly: its counts, and the states of its callbacks."""

from __future__ import annotations

import logging
import os

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from brain_lightning.checkpoints.hooks import load_hook
from brain_lightning.lightning_internals.counters import progress, set_progress
from brain_lightning.lightning_internals.trainer_callbacks import callbacks_of, has_hook
from brain_lightning.resume.plain_values import NotPlainError, State, plain
from brain_lightning.stages.run import Run

logger = logging.getLogger(__name__)


def trainer_state(trainer: Trainer, run: Run) -> State:
    """What there is to save of a Trainer beside a Brain.

    Args:
        trainer: The Trainer in ``fit``.
        run: The run.
    """
    return {
        "progress": {**progress(trainer), "batches": run.train.batches},
        "callbacks": _callback_states(trainer, run.warned),
    }


def _callback_states(trainer: Trainer, reported: set[str]) -> State:
    states = {}
    for callback in callbacks_of(trainer):
        state, whole = {}, not has_hook(callback, "on_save_checkpoint")
        try:
            state = plain(callback.state_dict())
        except NotPlainError:
            whole = False
        if not whole and callback.state_key not in reported:
            reported.add(callback.state_key)
            logger.warning(
                "Checkpoint directories do not hold all of the state of %s: it resumes from "
                "Lightning's checkpoints, by fit(ckpt_path=...).",
                type(callback).__name__,
            )
        if state:
            states[callback.state_key] = state
    return states


def resume_trainer(trainer: Trainer, run: Run, resumed: State) -> None:
    """Restores a Trainer from what a Brain has recovered.

    Args:
        trainer: The Trainer in ``on_fit_start``.
        run: The run that begins.
        resumed: The state of the run that was saved.
    """
    in_epoch = resumed["epoch"] is not None
    epochs = resumed["epochs"] - in_epoch
    run.run_state.epochs = epochs
    recovered = getattr(run.brain.checkpointer, "recoverables", {}).values()
    remembers = any(each is run.epochs.counter for each in recovered)
    if run.run_state.explicit:
        remembers = load_hook(run.epochs.counter) is not None
    if not remembers and (in_epoch or run.run_state.explicit):
        run.run_state.drawn = resumed["drawn"] - in_epoch
        run.epochs.skip(run.run_state.drawn)
    state = resumed["trainer"]
    if not state:
        return
    run.train.batches = state["progress"]["batches"]
    set_progress(trainer, **state["progress"])
    for callback in callbacks_of(trainer):
        if callback.state_key in state["callbacks"]:
            callback.load_state_dict(state["callbacks"][callback.state_key])


def saves_between_batches(trainer: Trainer) -> bool:
    """Whether a checkpoint may be saved when the next batch is fetched and not yet fitted.

    Args:
        trainer: The Trainer in ``fit``.
    """
    on_exception = any(isinstance(c, OnExceptionCheckpoint) for c in callbacks_of(trainer))
    return on_exception or getattr(trainer, "val_check_interval", None) != 1.0


def save_within_epoch(trainer: Trainer) -> None:
    """Saves as the Trainer saves, and replaces the save before.

    Args:
        trainer: The Trainer in ``fit``.
    """
    default = os.path.join(trainer.default_root_dir, "checkpoints")
    folder = getattr(trainer.checkpoint_callback, "dirpath", None) or default
    # ModelCheckpoint finds it for fit(ckpt_path="last").
    path = os.path.join(folder, "last-within-epoch.ckpt")
    if "://" in folder:
        trainer.save_checkpoint(path)
        return
    # Lightning may write to $TMPDIR first, and copy from there.
    trainer.save_checkpoint(f"{path}.part")
    if trainer.is_global_zero:
        os.replace(f"{path}.part", path)
    trainer.strategy.barrier("save_within_epoch")
