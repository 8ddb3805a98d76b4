"""Runs the searches of ``LearningRateFinder`` and ``BatchSizeFinder`` as trials.

Lightning's own searches run the Trainer's loops without ``BrainCallback``, which runs the
stages of a Brain. They also restore only weights and optimizers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.parsing import lightning_hasattr, lightning_setattr

from brain_lightning.data.batch_size import BatchSize
from brain_lightning.data.dataloaders import length_of
from brain_lightning.errors import UnsupportedError
from brain_lightning.lightning_internals.loops import fit_loop_of
from brain_lightning.lightning_internals.trainer_callbacks import (
    FinderArguments,
    TunerExitException,
    arguments_of_finder,
    callbacks_of,
)
from brain_lightning.stages.run import Run
from brain_lightning.temporary import TemporaryAttributes

from . import batch_size, learning_rate

logger = logging.getLogger(__name__)

# A function that searches with the arguments of a callback.
Find: TypeAlias = Callable[[Any, FinderArguments], None]
# Key in the saved state of a BatchSizeFinder, which saves no state in Lightning.
SIZE = "brain_lightning_size"


class Finders:
    """Redirects the searches of a Trainer's callbacks to trials.

    A callback requests its search in ``on_fit_start``, before the run has resumed. The search
    starts when ``start`` is called. A subclass of a callback may request another search
    between two epochs.

    Args:
        run: The run.
        trainer: The Trainer, before its ``setup``.
        temporary: Records the changes to the callbacks.
    """

    def __init__(self, run: Run, trainer: Trainer, temporary: TemporaryAttributes) -> None:
        self._run, self._trainer = run, trainer
        self._waiting: list[Callable[[], None]] = []
        # Batch sizes that callbacks found before the run was resumed.
        self._recovered: list[tuple[BatchSizeFinder, float]] = []
        self._sizes: dict[BatchSizeFinder, float] = {}
        self._may_begin = trainer.state.fn is not TrainerFn.FITTING
        for callback in callbacks_of(trainer):
            if isinstance(callback, LearningRateFinder):
                search = partial(self._ask, callback, self._find_rate)
                temporary.override(callback, "lr_find", search)
            elif isinstance(callback, BatchSizeFinder):
                search = partial(self._ask, callback, self._find_size)
                temporary.override(callback, "scale_batch_size", search)
                # It checks attributes and loaders of the module, which a Brain does not have.
                temporary.override(callback, "setup", _nothing)
                temporary.wrap(callback, "state_dict", partial(self._save_size, callback))
                temporary.wrap(callback, "load_state_dict", partial(self._load_size, callback))

    def start(self) -> None:
        """Starts the searches that callbacks have requested."""
        self._may_begin = True
        if self._waiting or self._recovered:
            # Lightning creates its DataLoader after on_fit_start.
            self._trainer.fit_loop.setup_data()
        while self._recovered:
            self._set_size(*self._recovered.pop(0))
        while self._waiting:
            self._waiting.pop(0)()

    def _ask(self, callback: Any, find: Find, *_: Any) -> None:
        if self._trainer.fast_dev_run:  # type: ignore[attr-defined]
            logger.warning("fast_dev_run is set, so no search is run.")
        elif self._may_begin:
            self._search(callback, find)
        else:
            self._waiting.append(partial(self._search, callback, find))

    def _search(self, callback: Any, find: Find) -> None:
        arguments = arguments_of_finder(callback)
        if self._run.run_state.resumed is not None and not arguments.ends_run:
            # The result of the search is recovered, and is still used.
            name = type(callback).__name__
            logger.info("The run is resumed, so %s does not search again.", name)
            return
        find(callback, arguments)
        if arguments.ends_run:
            # Lightning's Tuner ends the run after a search, without training.
            raise TunerExitException

    def _find_rate(self, callback: LearningRateFinder, arguments: FinderArguments) -> None:
        search = learning_rate.Search(**arguments.search)
        callback.optimal_lr = learning_rate.find(
            self._run, self._trainer, self._loader(), search
        )
        found = callback.optimal_lr.suggestion()
        if found is not None:
            logger.info("The suggested learning rate is %.3g.", found)
            if arguments.updates:
                learning_rate.apply(self._run.brain, found, arguments.name)
                logger.info(
                    "Every optimizer uses this learning rate now. If an annealing of the "
                    "recipe stores a separate initial rate, set it too, with --lr=%.3g.",
                    found,
                )

    def _find_size(self, callback: BatchSizeFinder, arguments: FinderArguments) -> None:
        search = batch_size.Search(**arguments.search)
        found = batch_size.find(self._run, self._trainer, self._loader(), search)
        self._set_size(callback, found)

    def _set_size(self, callback: BatchSizeFinder, found: float) -> None:
        loader, name = self._loader(), arguments_of_finder(callback).name
        callback.optimal_batch_size = int(found)
        self._sizes[callback] = found
        size = BatchSize(loader)
        size.set(found)
        module = self._trainer.lightning_module
        if lightning_hasattr(module, name):
            # A LightningDataModule reads it when it creates its DataLoaders again.
            lightning_setattr(module, name, int(found))
        if self._trainer.state.fn is TrainerFn.FITTING:
            fit_loop_of(self._trainer).change_length(length_of(loader))
        logger.info("The DataLoader now uses a %s of %g.", size.name, found)

    def _save_size(self, callback: BatchSizeFinder, original: Any) -> dict[str, Any]:
        """Saves the batch size that was found, because a resumed run needs equal batches."""
        found = self._sizes.get(callback)
        return {**original(), **({} if found is None else {SIZE: found})}

    def _load_size(
        self, callback: BatchSizeFinder, original: Any, state: dict[str, Any]
    ) -> None:
        own = dict(state)
        if SIZE in own:
            self._recovered.append((callback, own.pop(SIZE)))
        original(own)

    def _loader(self) -> Any:
        """Returns the DataLoader of the training set, or of the only set that is evaluated."""
        fn = self._trainer.state.fn
        if fn is TrainerFn.FITTING:
            if not self._run.train.loaders:
                raise UnsupportedError(
                    "the search cannot run before training, because the overridden fit of the "
                    "recipe creates or selects the DataLoader. Use brain-lightning tune, or "
                    "pass the DataLoader to trainer.fit."
                )
            return self._run.train.loader.loader
        if fn is TrainerFn.PREDICTING:
            raise UnsupportedError(
                "BatchSizeFinder does not support predict. Use it in fit, validate or test."
            )
        stage = self._run.test if fn is TrainerFn.TESTING else self._run.valid
        if len(stage.loaders) > 1:
            raise UnsupportedError(
                f"BatchSizeFinder supports one set, and the run has {len(stage.loaders)}. "
                "Pass one of them."
            )
        return stage.loaders[0].loader


def _nothing(trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
    """Replaces a check that does not apply to a Brain."""
