"""Lightning's callbacks that search before training, whose searches are trials here.

Lightning's own run the loops of the Trainer, without the callback that runs the stages of a
Brain, and restore weights and optimizers alone.
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

# Searches as a callback was told to.
Find: TypeAlias = Callable[[Any, FinderArguments], None]
# In the state of a BatchSizeFinder, which has none by itself.
SIZE = "brain_lightning_size"


class Finders:
    """The callbacks of a Trainer that search before training.

    A callback asks for its search in ``on_fit_start``, before a run has resumed: it is begun
    when ``start`` is called. A subclass may ask again between two epochs.

    Args:
        run: The run.
        trainer: The Trainer, before its ``setup``.
        temporary: Records what is changed on its callbacks.
    """

    def __init__(self, run: Run, trainer: Trainer, temporary: TemporaryAttributes) -> None:
        self._run, self._trainer = run, trainer
        self._waiting: list[Callable[[], None]] = []
        # Of a run that is resumed, by the callbacks that have found them.
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
                # It asks for attributes of a module, and for loaders that a module makes.
                temporary.override(callback, "setup", _nothing)
                temporary.wrap(callback, "state_dict", partial(self._save_size, callback))
                temporary.wrap(callback, "load_state_dict", partial(self._load_size, callback))

    def start(self) -> None:
        """Begins the searches that were asked for."""
        self._may_begin = True
        if self._waiting or self._recovered:
            # Lightning makes its loader after on_fit_start.
            self._trainer.fit_loop.setup_data()
        while self._recovered:
            self._set_size(*self._recovered.pop(0))
        while self._waiting:
            self._waiting.pop(0)()

    def _ask(self, callback: Any, find: Find, *_: Any) -> None:
        if self._trainer.fast_dev_run:  # type: ignore[attr-defined]
            logger.warning("fast_dev_run: nothing is searched.")
        elif self._may_begin:
            self._search(callback, find)
        else:
            self._waiting.append(partial(self._search, callback, find))

    def _search(self, callback: Any, find: Find) -> None:
        arguments = arguments_of_finder(callback)
        if self._run.run_state.resumed is not None and not arguments.ends_run:
            # What was found is recovered, and holds.
            name = type(callback).__name__
            logger.info("The run is resumed: %s does not search again.", name)
            return
        find(callback, arguments)
        if arguments.ends_run:
            # Of Lightning's Tuner, which has nothing trained.
            raise TunerExitException

    def _find_rate(self, callback: LearningRateFinder, arguments: FinderArguments) -> None:
        search = learning_rate.Search(**arguments.search)
        callback.optimal_lr = learning_rate.find(
            self._run, self._trainer, self._loader(), search
        )
        found = callback.optimal_lr.suggestion()
        if found is not None:
            logger.info("A learning rate of %.3g is suggested.", found)
            if arguments.updates:
                learning_rate.apply(self._run.brain, found, arguments.name)
                logger.info(
                    "Every optimizer has it now. An annealing of the recipe that keeps a "
                    "rate of its own begins with that: give it to the recipe, --lr=%.3g.",
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
            # Of a LightningDataModule, which may make its loaders again.
            lightning_setattr(module, name, int(found))
        if self._trainer.state.fn is TrainerFn.FITTING:
            fit_loop_of(self._trainer).change_length(length_of(loader))
        logger.info("The loader has a %s of %g now.", size.name, found)

    def _save_size(self, callback: BatchSizeFinder, original: Any) -> dict[str, Any]:
        """What it has found is of the run: the batches of another size are others."""
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
        """Of what runs: the training set, or the one set that is evaluated."""
        fn = self._trainer.state.fn
        if fn is TrainerFn.FITTING:
            if not self._run.train.loaders:
                raise UnsupportedError(
                    "nothing can be searched before training where the recipe's own fit makes "
                    "or chooses the loader: search with brain-lightning tune, or give fit's "
                    "loader to a Trainer"
                )
            return self._run.train.loader.loader
        if fn is TrainerFn.PREDICTING:
            raise UnsupportedError("BatchSizeFinder searches in fit, validate and test alone")
        stage = self._run.test if fn is TrainerFn.TESTING else self._run.valid
        if len(stage.loaders) > 1:
            raise UnsupportedError(
                f"BatchSizeFinder searches with one set, and there are {len(stage.loaders)}: "
                "give one of them"
            )
        return stage.loaders[0].loader


def _nothing(trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
    """Stands for a check that does not hold for a Brain."""
