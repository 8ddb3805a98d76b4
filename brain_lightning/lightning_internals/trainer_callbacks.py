"""The callbacks of a Trainer: their hooks, states and saves, and averages of weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from lightning.fabric.utilities import registry
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
)
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.tuner.lr_finder import _LRFinder
from lightning.pytorch.utilities.exceptions import _TunerExitException
from torch import Tensor, nn

from brain_lightning.checkpoints import state_files
from brain_lightning.distributed.communication import by_main_process
from brain_lightning.step.pruning import ORIGINAL
from brain_lightning.temporary import TemporaryAttributes

# The name of the recoverable for averages of weights.
AVERAGES = "brain_lightning_averages"
# Has ``results``, ``suggestion()`` and ``plot()``, as in Lightning's documentation.
LearningRates: TypeAlias = _LRFinder
# Ends the fit of Tuner.lr_find and Tuner.scale_batch_size after the search.
TunerExitException: TypeAlias = _TunerExitException


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Returns the callbacks of a Trainer; Lightning's type hints lack this attribute.

    Args:
        trainer: Any Trainer.
    """
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def look_up_entry_points_once(temporary: TemporaryAttributes) -> None:
    """Caches the entry points of installed packages, which each new Trainer searches.

    ``brain.fit`` creates a Trainer for each fit, and a recipe may fit in each epoch.

    Args:
        temporary: Records the changes while a Trainer is created.
    """
    temporary.set(registry, "entry_points", _entry_points)


@cache
def _entry_points(group: str) -> EntryPoints:
    return entry_points(group=group)


def has_hook(callback: Callback, hook: str) -> bool:
    """Whether a callback overrides a hook, in its class or on the instance.

    Args:
        callback: The callback.
        hook: A method of ``Callback``.
    """
    method = getattr(callback, hook)
    return getattr(method, "__func__", None) is not getattr(Callback, hook)


def overwrite_files(trainer: Trainer, temporary: TemporaryAttributes) -> None:
    """Makes ModelCheckpoint overwrite a file, instead of adding a version to its name.

    Args:
        trainer: The Trainer of a run that was resumed at the end of an epoch. The killed run
            may have saved the files of this epoch.
        temporary: Records the changes.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, ModelCheckpoint):
            temporary.set(callback, "_enable_version_counter", False)


def state_of(callback: Callback) -> dict[str, Any]:
    """Returns the state that a callback needs to resume.

    Args:
        callback: The callback.

    Returns:
        The ``state_dict`` of the callback. For ModelPruning, which has none, the weights to
        which its lottery ticket resets. The value is None for a weight that was reset, because
        it then shares the memory of the trained weight.
    """
    if not isinstance(callback, ModelPruning):
        return callback.state_dict()
    tickets = {
        str(index): None if first.data_ptr() == trained.data_ptr() else first.detach().cpu()
        for index, first, trained in _reset_weights(callback)
    }
    return {"tickets": tickets} if tickets else {}


def load_state(callback: Callback, state: dict[str, Any]) -> None:
    """Restores the state of a callback.

    Args:
        callback: The callback.
        state: Return value of ``state_of``.
    """
    if not isinstance(callback, ModelPruning):
        callback.load_state_dict(state)
        return
    for index, first, trained in _reset_weights(callback):
        saved = state["tickets"][str(index)]
        first.data = trained.data if saved is None else saved.to(first.device)


def _reset_weights(callback: ModelPruning) -> Iterator[tuple[int, nn.Parameter, Tensor]]:
    """Yields an index, the weight to which ModelPruning resets, and the trained weight."""
    for layer in (callback._original_layers or {}).values():
        for index, name in layer["names"]:
            module, _ = callback._parameters_to_prune[index]
            trained = getattr(module, name + ORIGINAL, None)
            yield (
                index,
                getattr(layer["data"], name),
                getattr(module, name) if trained is None else trained,
            )


def repair(callback: Callback, temporary: TemporaryAttributes) -> None:
    """Makes SpikeDetection resume, which fails in Lightning 2.6.6.

    Its ``load_state_dict`` reads the attribute ``running``, which does not exist. Its state
    lacks the window of losses, ``running_mean``.

    Args:
        callback: Any callback.
        temporary: Records the changes.
    """
    if not isinstance(callback, SpikeDetection):
        return
    window = callback.running_mean
    window.persistent(True)
    temporary.override(callback, "running", window)

    def state_dict(original: Any) -> dict[str, Any]:
        return {**original(), "seen": window._num_vals_seen}

    def load_state_dict(original: Any, state: dict[str, Any]) -> None:
        window._num_vals_seen = state.pop("seen", 0)
        original(state)

    temporary.wrap(callback, "state_dict", state_dict)
    temporary.wrap(callback, "load_state_dict", load_state_dict)


def save_as_automatic(trainer: Trainer, temporary: TemporaryAttributes) -> None:
    """Makes ModelCheckpoint save after a batch, also with manual optimization.

    Since Lightning 2.6, ModelCheckpoint uses only ``every_n_train_steps`` with manual
    optimization, and warns that it would save weights after a step
    (https://github.com/Lightning-AI/pytorch-lightning/issues/21699).

    Args:
        trainer: The Trainer of a Brain that overrides ``fit_batch``.
        temporary: Records the changes to the callbacks.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, ModelCheckpoint):
            temporary.wrap(callback, "on_train_batch_end", _call_as_automatic)


def _call_as_automatic(
    hook: Any, trainer: Trainer, module: LightningModule, *args: Any, **kwargs: Any
) -> None:
    hook(trainer, _Automatic(module), *args, **kwargs)


class _Automatic:
    """A proxy of a module that claims to use automatic optimization."""

    automatic_optimization = True

    def __init__(self, module: LightningModule) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def leave_groups_as_recovered(callback: Callback) -> None:
    """Keeps BaseFinetuning from replacing the parameter groups when the next run starts.

    The groups are already recovered with the optimizers, by name.

    Args:
        callback: A callback that has loaded its state after ``on_fit_start``.
    """
    if isinstance(callback, BaseFinetuning):
        callback._restarting = False


class AverageInUse:
    """Averages that callbacks swap with the weights; saves and restores them.

    ``WeightAveraging`` (Lightning 2.6) swaps the weights with their average during a
    validation. If the recipe saves at the end of a validation, the modules in its checkpoint
    contain the average, which was validated. A separate file contains the weights, with which
    training resumes.
    """

    def __init__(self) -> None:
        self._averaging: list[Any] = []
        self._in_use: dict[int, Any] = {}
        # The callbacks that have just swapped the weights back.
        self._measured: list[Any] = []
        self._recovered: dict[str, Any] = {}

    def register(
        self, callbacks: Sequence[Callback], checkpointer: Any, temporary: TemporaryAttributes
    ) -> None:
        """Adds the averages to the recoverables during a run.

        Args:
            callbacks: The callbacks of the Trainer.
            checkpointer: The checkpointer of the Brain.
            temporary: Records the changes to the checkpointer.
        """
        self._averaging = [each for each in callbacks if hasattr(each, "_swap_models")]
        if self._averaging:
            hooks = (AverageInUse.recover, AverageInUse.save)
            checkpointer.add_recoverable(AVERAGES, self, *hooks, optional_load=True)
            temporary.callback(checkpointer.recoverables.pop, AVERAGES, None)

    def is_saved(self, callback: Callback) -> bool:
        """Whether the average of a callback is a recoverable.

        Args:
            callback: A callback of the Trainer.
        """
        return any(callback is each for each in self._averaging)

    def save(self, path: str | Path) -> None:
        """Saves the averages, or the weights if they are currently swapped.

        Args:
            path: The file.
        """
        states = {
            callback.state_key: {
                "in_use": id(callback) in self._in_use,
                "state": callback._average_model.state_dict(),
            }
            for callback in self._averaging
        }
        by_main_process(lambda: state_files.write_state(states, path))

    def recover(self, path: str | Path, end_of_epoch: bool) -> None:
        """Reads the file from ``save``, which takes effect when training starts.

        Args:
            path: The file.
            end_of_epoch: Not used.
        """
        self._recovered = state_files.load_state(path)

    def resume(self, module: LightningModule, resumes: bool) -> None:
        """Restores the averages, and the weights if they were swapped when they were saved.

        Args:
            module: The module, which has recovered its weights.
            resumes: Whether a run is resumed from a directory. If the directory has no
                average, the average starts with the weights, as in Lightning.
        """
        recovered, self._recovered = self._recovered, {}
        for callback in self._averaging:
            average, saved = callback._average_model, recovered.get(callback.state_key)
            if saved is not None:
                average.load_state_dict(saved["state"])
                if saved["in_use"]:
                    callback._swap_models(module)
            elif resumes:
                average.module.load_state_dict(module.state_dict())

    def watch(self, callbacks: Sequence[Callback], temporary: TemporaryAttributes) -> None:
        """Records each swap, until ``temporary`` is restored.

        Args:
            callbacks: The callbacks of the Trainer.
            temporary: Records the changes to the callbacks.
        """
        for callback in callbacks:
            swap = getattr(callback, "_swap_models", None)
            if swap is not None:
                recorded = partial(self._swap, callback, swap)
                temporary.override(callback, "_swap_models", recorded)

    def _swap(self, callback: Any, swap: Any, module: LightningModule) -> None:
        swap(module)
        if self._in_use.pop(id(callback), None) is None:
            self._in_use[id(callback)] = swap
        else:
            self._measured.append(callback)

    @contextmanager
    def measured(self, module: LightningModule) -> Iterator[None]:
        """Swaps the averages in again at the end of the validation that used them.

        Lightning swaps the weights back before it calls the module's end hook.

        Args:
            module: The module that trains.

        Yields:
            None
        """
        measured, self._measured = self._measured, []
        for callback in measured:
            callback._swap_models(module)
        try:
            yield
        finally:
            for callback in reversed(measured):
                callback._swap_models(module)
            self._measured = []

    @contextmanager
    def swapped_back(self, module: LightningModule) -> Iterator[None]:
        """Swaps the weights back in while something is saved.

        Args:
            module: The module that trains.

        Yields:
            None
        """
        in_use, self._in_use = self._in_use, {}
        swaps = list(in_use.values())
        for swap in swaps:
            swap(module)
        yield
        for swap in reversed(swaps):
            swap(module)
        self._in_use = in_use

    def correct(self, checkpoint: dict[str, Any]) -> None:
        """Swaps weights and average in a file that ``WeightAveraging`` adds both to.

        Args:
            checkpoint: The content of the file.
        """
        if self._in_use and "current_model_state" in checkpoint:
            weights, average = checkpoint["state_dict"], checkpoint["current_model_state"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = average, weights


def learning_rates(
    mode: str, min_lr: float, max_lr: float, rates: Sequence[float], losses: Sequence[float]
) -> LearningRates:
    """Returns a result of ``Tuner.lr_find``, which suggests a learning rate.

    Args:
        mode: ``exponential`` or ``linear``.
        min_lr: The smallest learning rate.
        max_lr: The largest learning rate.
        rates: The learning rates that were tried.
        losses: The smoothed loss at each learning rate.
    """
    found = _LRFinder(mode, min_lr, max_lr, len(rates))
    found.results = {"lr": list(rates), "loss": list(losses)}
    return found


class FinderArguments(NamedTuple):
    """The arguments of a LearningRateFinder or BatchSizeFinder.

    Attributes:
        search: Arguments of the search.
        updates: Whether to use the value that is found.
        name: Name of the attribute to set to this value; may be empty.
        ends_run: Whether the run ends after the search, as for ``Tuner``.
    """

    search: dict[str, Any]
    updates: bool
    name: str
    ends_run: bool


def arguments_of_finder(callback: LearningRateFinder | BatchSizeFinder) -> FinderArguments:
    """Returns the arguments of a finder.

    Args:
        callback: The callback.
    """
    if isinstance(callback, LearningRateFinder):
        arguments = {
            "min_lr": callback._min_lr,
            "max_lr": callback._max_lr,
            "num_training": callback._num_training_steps,
            "mode": callback._mode,
            "early_stop_threshold": callback._early_stop_threshold,
        }
        return FinderArguments(
            arguments, callback._update_attr, callback._attr_name, callback._early_exit
        )
    arguments = {
        "mode": callback._mode,
        "steps_per_trial": callback._steps_per_trial,
        "init_val": callback._init_val,
        "max_trials": callback._max_trials,
        # New in Lightning 2.6.
        "margin": getattr(callback, "_margin", 0.0),
        "max_val": getattr(callback, "_max_val", sys.maxsize),
    }
    return FinderArguments(arguments, True, callback._batch_arg_name, callback._early_exit)
