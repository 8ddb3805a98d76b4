"""Saves and restores the state of a Trainer for the run of a Brain."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
)

from brain_lightning.checkpoints.hooks import load_hook
from brain_lightning.distributed.ddp import plain_name
from brain_lightning.lightning_internals.counters import (
    batches_so_far,
    logged_steps,
    progress,
    reloads,
    set_progress,
    set_reloads,
)
from brain_lightning.lightning_internals.signals import requeue_job, requeue_path
from brain_lightning.lightning_internals.trainer_callbacks import (
    AverageInUse,
    callbacks_of,
    has_hook,
    leave_groups_as_recovered,
    load_state,
    state_of,
)
from brain_lightning.loggers.csv_rows import RunRows
from brain_lightning.optimizers.group import OptimizerGroup
from brain_lightning.optimizers.module_attributes import (
    AttributeChanges,
    Attributes,
    module_attributes,
    restore_module_attributes,
)
from brain_lightning.phase import Phase
from brain_lightning.resume.plain_values import NotPlainError, State, plain
from brain_lightning.resume.saved_state import ProcessState
from brain_lightning.stages.interval_checkpoints import is_asked_for
from brain_lightning.stages.metrics import merge_records
from brain_lightning.stages.run import Run
from brain_lightning.step.pruning import masks, restore_masks

from .called_hooks import CalledHooks
from .recoverables import recover_beside_weights, recover_options, state_beside_weights
from .savers import saves_between_batches, saves_within_batch

logger = logging.getLogger(__name__)

# States of these callbacks are as large as the weights, and identical on all ranks.
OF_WEIGHTS = (ModelPruning, StochasticWeightAveraging)


class LightningSide:
    """The Trainer's side of a run (``resume.saved_state.TrainerSide``).

    Args:
        trainer: The Trainer in its ``setup``.
        run: The run.
        rows: The rows that the Trainer's loggers have written in this run.
        shows_bar: Whether to show SpeechBrain's progress bar.

    Attributes:
        called_hooks: The callback hooks that were called.
        average: The average that a callback has swapped with the weights.
    """

    def __init__(self, trainer: Trainer, run: Run, rows: RunRows, shows_bar: bool) -> None:
        self._trainer, self._run, self._rows = trainer, run, rows
        self.shows_bar = shows_bar
        self.validates = trainer.enable_validation
        self.saves = bool(trainer.checkpoint_callbacks) or is_asked_for(run.brain)
        self.saves_within_batch = saves_within_batch(trainer, run.brain)
        self.saves_after_fetch = self.saves_within_batch or saves_between_batches(trainer)
        self.called_hooks = CalledHooks(trainer, run)
        self.average = AverageInUse()
        self._attributes = AttributeChanges(run.brain)
        self._reloads: list[float] = []
        self._groups: State = {}
        self._reported: set[str] = set()
        batches, run.train.windows = batches_so_far(trainer)
        run.train.batches = run.train.earlier = batches

    def state(self) -> State:
        """See ``TrainerSide``."""
        trainer, train = self._trainer, self._run.train
        counts = progress(trainer)
        counts["global_step"] += train.uncounted_steps
        # The state after this batch is saved, but the batch is not counted yet.
        counts_batch = train.is_fitted and not self.may_call_end_hooks()
        metrics = {name: value.cpu() for name, value in trainer.callback_metrics.items()}
        return {
            "progress": {**counts, "batches": train.earlier},
            "windows": train.windows + (counts_batch and not train.accumulates),
            "last_batch": {"steps": train.steps, "accumulates": train.accumulates},
            "callbacks": self._callback_states(),
            "reloads": reloads(trainer),
            "trained": self._attributes.changed(self._module_attributes()),
            "told": self.called_hooks.state(),
            "metrics": metrics,
            "logged": self._rows.save(logged_steps(trainer)),
            "found": self._run.metrics.state(),
            "records": plain(self._run.brain._lightning.records),
            "should_stop": trainer.should_stop and _has_stopped_early(trainer),
            "masks": plain(masks(self._run.brain.modules, self._plain_name)),
        }

    def _module_attributes(self) -> Attributes:
        state = self._run.run_state
        # An incomplete batch is fitted again, so the attributes before the batch are saved.
        before = state.before.attributes if state.phase is Phase.FITTING else {}
        return before or module_attributes(self._run.brain)

    def _plain_name(self, name: str) -> str:
        return plain_name(name, self._run.brain)

    def _callback_states(self) -> State:
        states = {}
        for callback in callbacks_of(self._trainer):
            if isinstance(callback, OF_WEIGHTS) and not self._trainer.is_global_zero:
                # Rank 0 saves it.
                continue
            # ModelPruning saves weights; averages are in a separate file.
            elsewhere = isinstance(callback, ModelPruning) or self.average.is_saved(callback)
            state, whole = {}, elsewhere or not has_hook(callback, "on_save_checkpoint")
            try:
                state = plain(state_of(callback))
            except NotPlainError:
                whole = False
            if not whole and callback.state_key not in self._reported:
                self._reported.add(callback.state_key)
                logger.warning(
                    "Checkpoint directories (CKPT+...) do not contain the full state of %s. "
                    "To resume it, save with ModelCheckpoint, and use fit(ckpt_path=...).",
                    type(callback).__name__,
                )
            if state:
                states[callback.state_key] = state
        return states

    def may_call_end_hooks(self) -> bool:
        """See ``TrainerSide``."""
        can_call_again = self._run.run_state.position.can_fetch_again()
        return can_call_again and self.called_hooks.is_incomplete("on_train_batch_end")

    def weights(self) -> AbstractContextManager[None]:
        """See ``TrainerSide``."""
        return self.average.swapped_back(self._trainer.lightning_module)

    def measured(self) -> AbstractContextManager[None]:
        """See ``TrainerSide``."""
        return self.average.measured(self._trainer.lightning_module)

    def correct(self, checkpoint: dict[str, Any]) -> None:
        """See ``TrainerSide``."""
        self.average.correct(checkpoint)

    def remember_trained(self) -> None:
        """See ``TrainerSide``."""
        self._attributes.remember()

    def state_beside_weights(self) -> State:
        """See ``TrainerSide``."""
        return state_beside_weights(self._run)

    def save_within_epoch(self) -> None:
        """Saves a checkpoint with the Trainer, and replaces the previous one."""
        trainer = self._trainer
        default = os.path.join(trainer.default_root_dir, "checkpoints")
        folder = getattr(trainer.checkpoint_callback, "dirpath", None) or default
        # With this name, ModelCheckpoint finds it for fit(ckpt_path="last").
        self._save(os.fspath(folder), "last-within-epoch.ckpt")

    def requeue(self) -> bool:
        """See ``TrainerSide``."""
        if self._run.brain.checkpointer is None:
            self._save(*os.path.split(requeue_path(self._trainer)))
        return requeue_job(self._trainer)

    def _save(self, folder: str, name: str) -> None:
        trainer, path = self._trainer, os.path.join(folder, name)
        if "://" in folder:
            trainer.save_checkpoint(path)
            return
        # os.replace is atomic, while Lightning may copy the file from $TMPDIR. The temporary
        # name must not contain "hpc_ckpt_", which Lightning looks for.
        part = os.path.join(folder, "within-epoch.ckpt.part")
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            os.replace(part, path)
        trainer.strategy.barrier("save_within_epoch")

    def resume(self, resumed: ProcessState) -> None:
        """Restores the Trainer from the run state that the Brain has recovered.

        Args:
            resumed: The saved state of the run.
        """
        if resumed["beside_weights"]:
            recover_beside_weights(self._run, resumed["beside_weights"])
            self._groups = resumed["beside_weights"]["groups"]
            resumed["end_of_epoch"] = False
        _resume_epochs(self._run, resumed)
        state = resumed["trainer"]
        if not state:
            self._rows.begin()
            return
        trainer, run, epoch = self._trainer, self._run, resumed["epoch"]
        counts = dict(state["progress"])
        run.train.earlier = counts["batches"]
        counts["batches"] += 0 if epoch is None else epoch["batches"]
        run.train.batches = counts["batches"]
        # Older files have only the number of batches.
        run.train.windows = state.get("windows", counts["batches"])
        for name, value in state.get("last_batch", {}).items():
            setattr(run.train, name, value)
        set_progress(trainer, **counts, windows=run.train.windows)
        # Files of earlier versions have no "logged"; then the step is used.
        self._rows.resume(state.get("logged", {}), logged_steps(trainer))
        restore_module_attributes(run.brain, state.get("trained", {}))
        self.show_unfrozen()
        for callback in callbacks_of(trainer):
            if callback.state_key in state["callbacks"]:
                _load(callback, state["callbacks"][callback.state_key])
        if "masks" in state:
            restore_masks(run.brain.modules, state["masks"], self._plain_name)
        # Files have these keys since version 1.
        if "told" in state:
            self._reloads = state["reloads"]
            self.called_hooks.restore(state["told"], self._resume_metrics(state))
            if run.run_state.resumed_phase is not Phase.VALID_OVER:
                run.metrics.restore(state["found"])
            # A Timer may have stopped the run already.
            trainer.should_stop |= state["should_stop"]

    def _resume_metrics(self, state: State) -> Collection[str]:
        """Restores the metrics that callbacks monitor, without logging them again.

        Args:
            state: The saved state of the Trainer.

        Returns:
            The names of the metrics that were reported in the resumed epoch.
        """
        trainer, run = self._trainer, self._run
        merge_records(run.brain._lightning.records, state.get("records", {}))
        run.metrics.restore(state["found"])
        found = run.take_metrics(from_all_ranks=trainer.world_size > 1)
        trainer.callback_metrics.update(state["metrics"])
        trainer.callback_metrics.update({n: torch.tensor(v) for n, v in found.items()})
        # If found is not empty, callbacks have not read it, and state has older metrics.
        return found.keys() or state["metrics"].keys()

    def show_unfrozen(self) -> None:
        """Makes unfrozen parameters visible to callbacks in the optimizer's groups."""
        for optimizer in self._trainer.optimizers:
            if isinstance(optimizer, OptimizerGroup):
                optimizer.show_unfrozen()

    def resume_after_loading(self) -> None:
        """Restores what Lightning has overwritten when it set up loaders and optimizers."""
        if self._groups:
            recover_options(self._run, self._groups)
        if self._reloads:
            set_reloads(self._trainer, self._reloads)


def _load(callback: Callback, state: State) -> None:
    if isinstance(callback, Timer):
        # Lightning's files restore the time. Otherwise max_time applies to each start.
        return
    load_state(callback, state)
    leave_groups_as_recovered(callback)
    if isinstance(callback, ModelCheckpoint):
        # ModelCheckpoint saves current_score, but does not load it.
        callback.current_score = state["current_score"]


def _has_stopped_early(trainer: Trainer) -> bool:
    stopping = trainer.early_stopping_callbacks
    return any(
        each is not None and (each.stopped_epoch or each.wait_count >= each.patience)
        for each in stopping
    )


def _resume_epochs(run: Run, resumed: ProcessState) -> None:
    """Makes the epoch counter yield the epoch in which the run resumes."""
    state, epochs, counted = run.run_state, run.epochs, resumed["end_of_epoch"]
    recovered = getattr(run.brain.checkpointer, "recoverables", {}).values()
    remembers = any(each is epochs.counter for each in recovered)
    if state.explicit:
        remembers = load_hook(epochs.counter) is not None
    restarts = counted and not remembers and not state.explicit
    if restarts and state.resumed_phase is not Phase.VALID_OVER:
        # The first epoch comes next, as in SpeechBrain with a range as epoch counter.
        resumed["epoch"] = None
    epoch, in_epoch = resumed["epoch"], resumed["epoch"] is not None
    state.epochs = resumed["epochs"] - in_epoch
    if not remembers and not restarts:
        state.drawn = resumed["drawn"] - (in_epoch and not counted)
        epochs.skip(state.drawn)
    if epoch is not None and counted:
        # The counter yields no number for the rest of this epoch.
        state.drawn -= 1
        epochs.resume(epoch["number"])
