"""The callbacks of a Trainer: their hooks, when they save, and who exchanges the weights."""

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

# The name of the recoverable.
AVERAGES = "brain_lightning_averages"
# With ``results``, ``suggestion()`` and ``plot()``, as the documentation of Lightning has it.
LearningRates: TypeAlias = _LRFinder
# Ends a fit of Tuner.lr_find and Tuner.scale_batch_size when they have found something.
TunerExitException: TypeAlias = _TunerExitException


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The callbacks of a Trainer, an attribute that Lightning's type hints do not show.

    Args:
        trainer: Any Trainer.
    """
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def look_up_entry_points_once(temporary: TemporaryAttributes) -> None:
    """Lets a Trainer find the callbacks of other packages without reading them all again.

    ``brain.fit`` makes a Trainer for each fit, and a recipe may fit in each epoch.

    Args:
        temporary: Records what is changed while a Trainer is made.
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
    """Lets ModelCheckpoint write a file again, and not one that is numbered beside it.

    Args:
        trainer: The Trainer of a run that was resumed at the end of an epoch, which may have
            saved its files before it was killed.
        temporary: Records what is changed.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, ModelCheckpoint):
            temporary.set(callback, "_enable_version_counter", False)


def state_of(callback: Callback) -> dict[str, Any]:
    """What a callback needs to resume.

    Args:
        callback: The callback.

    Returns:
        Its ``state_dict``. ModelPruning has none: the weights that its lottery ticket resets
        to, or None for one that it has reset: from then on it shares the trained weight.
    """
    if not isinstance(callback, ModelPruning):
        return callback.state_dict()
    tickets = {
        str(index): None if first.data_ptr() == trained.data_ptr() else first.detach().cpu()
        for index, first, trained in _tickets(callback)
    }
    return {"tickets": tickets} if tickets else {}


def load_state(callback: Callback, state: dict[str, Any]) -> None:
    """Restores it.

    Args:
        callback: The callback.
        state: From ``state_of``.
    """
    if not isinstance(callback, ModelPruning):
        callback.load_state_dict(state)
        return
    for index, first, trained in _tickets(callback):
        saved = state["tickets"][str(index)]
        first.data = trained.data if saved is None else saved.to(first.device)


def _tickets(callback: ModelPruning) -> Iterator[tuple[int, nn.Parameter, Tensor]]:
    """What a weight is reset to, and the weight."""
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
    """Lets SpikeDetection resume, which of Lightning 2.6.6 cannot.

    Its ``load_state_dict`` looks for ``running``, and the window of losses, which is
    ``running_mean``, is not in its state.

    Args:
        callback: Any callback.
        temporary: Records what is changed.
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
    """Lets ModelCheckpoint save after a batch, whoever makes the steps.

    Since Lightning 2.6 it looks at ``every_n_train_steps`` alone with manual optimization, and
    warns of weights that it would save after a step
    (https://github.com/Lightning-AI/pytorch-lightning/issues/21699).

    Args:
        trainer: The Trainer of a Brain that overrides ``fit_batch``.
        temporary: Records what is changed on its callbacks.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, ModelCheckpoint):
            temporary.wrap(callback, "on_train_batch_end", _told_by_automatic)


def _told_by_automatic(
    hook: Any, trainer: Trainer, module: LightningModule, *args: Any, **kwargs: Any
) -> None:
    hook(trainer, _Automatic(module), *args, **kwargs)


class _Automatic:
    """A module, as ModelCheckpoint sees one with automatic optimization."""

    automatic_optimization = True

    def __init__(self, module: LightningModule) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def leave_groups_as_recovered(callback: Callback) -> None:
    """Keeps BaseFinetuning from assigning, when the next run starts, the groups of its state.

    They are recovered with the optimizers, by name.

    Args:
        callback: A callback that has loaded its state after ``on_fit_start``.
    """
    if isinstance(callback, BaseFinetuning):
        callback._restarting = False


class AverageInUse:
    """The averages that callbacks have put in place of the weights, and save.

    ``WeightAveraging`` of Lightning 2.6 exchanges both while it validates. A recipe's own
    checkpoint, saved when a validation ends, holds in its modules what was measured, the
    average; the weights are in a file beside, with which training is resumed.
    """

    def __init__(self) -> None:
        self._averaging: list[Any] = []
        self._in_use: dict[int, Any] = {}
        # Those that were exchanged back last.
        self._measured: list[Any] = []
        self._recovered: dict[str, Any] = {}

    def register(
        self, callbacks: Sequence[Callback], checkpointer: Any, temporary: TemporaryAttributes
    ) -> None:
        """Makes the averages recoverables for the time of a run, where there are any.

        Args:
            callbacks: Those of the Trainer.
            checkpointer: The Brain's.
            temporary: Records what is changed on it.
        """
        self._averaging = [each for each in callbacks if hasattr(each, "_swap_models")]
        if self._averaging:
            hooks = (AverageInUse.recover, AverageInUse.save)
            checkpointer.add_recoverable(AVERAGES, self, *hooks, optional_load=True)
            temporary.callback(checkpointer.recoverables.pop, AVERAGES, None)

    def is_saved(self, callback: Callback) -> bool:
        """Whether the average of a callback is a recoverable.

        Args:
            callback: One of the Trainer's.
        """
        return any(callback is each for each in self._averaging)

    def save(self, path: str | Path) -> None:
        """Saves the averages, or what they have been exchanged for.

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
        """Reads what ``save`` has written; it takes effect when training starts.

        Args:
            path: The file.
            end_of_epoch: Of no importance here.
        """
        self._recovered = state_files.load_state(path)

    def resume(self, module: LightningModule, resumes: bool) -> None:
        """Resumes averages, and the weights that were saved in their place.

        Args:
            module: The module, which has recovered its weights.
            resumes: Whether a run is resumed from a directory: where that has no average,
                it begins with the weights, as Lightning's does.
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
        """Records each exchange, until ``temporary`` is restored.

        Args:
            callbacks: Those of the Trainer.
            temporary: Records what is changed on them.
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
        """Has the averages in use that a validation has just measured, while it ends.

        Lightning exchanges them before a module hears that the validation is over.

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
    def put_back(self, module: LightningModule) -> Iterator[None]:
        """Exchanges them for the weights, for what is saved within.

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
        """Exchanges them in a file that ``WeightAveraging`` has written both to.

        Args:
            checkpoint: The content of the file.
        """
        if self._in_use and "current_model_state" in checkpoint:
            weights, average = checkpoint["state_dict"], checkpoint["current_model_state"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = average, weights


def learning_rates(
    mode: str, min_lr: float, max_lr: float, rates: Sequence[float], losses: Sequence[float]
) -> LearningRates:
    """The result of ``Tuner.lr_find``, from which it suggests a learning rate.

    Args:
        mode: ``exponential`` or ``linear``.
        min_lr: The smallest rate.
        max_lr: The largest rate.
        rates: Those that were tried.
        losses: The smoothed loss at each.
    """
    found = _LRFinder(mode, min_lr, max_lr, len(rates))
    found.results = {"lr": list(rates), "loss": list(losses)}
    return found


class FinderArguments(NamedTuple):
    """What a callback that searches was given.

    Attributes:
        search: How to search.
        updates: Whether to use what is found.
        name: Of the attribute that gets it; may be empty.
        ends_run: Whether the run ends when something is found, as for ``Tuner``.
    """

    search: dict[str, Any]
    updates: bool
    name: str
    ends_run: bool


def arguments_of_finder(callback: LearningRateFinder | BatchSizeFinder) -> FinderArguments:
    """What a callback that searches was given.

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
        # Of earlier Lightnings there is none.
        "margin": getattr(callback, "_margin", 0.0),
        "max_val": getattr(callback, "_max_val", sys.maxsize),
    }
    return FinderArguments(arguments, True, callback._batch_arg_name, callback._early_exit)
