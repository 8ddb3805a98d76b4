"""Wraps the loaders that are passed to a Trainer, so that their stages control them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any
from weakref import WeakSet

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.data_connector import (
    _DataLoaderSource,
    _resolve_overfit_batches,
)
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.combined_loader import _SUPPORTED_MODES
from lightning.pytorch.utilities.data import _is_dataloader_shuffled
from torch.utils.data import DataLoader

from brain_lightning.compat.speechbrain import is_looped_loader
from brain_lightning.data.dataloaders import has_indices, is_sharded
from brain_lightning.data.several_loaders import (
    SeveralLoaders,
    SeveralSamplers,
    are_several,
    set_names,
)
from brain_lightning.errors import RunOptionError, UnsupportedError
from brain_lightning.stage import Stage
from brain_lightning.stages.base import RunStage
from brain_lightning.stages.loader import StageLoader
from brain_lightning.temporary import TemporaryAttributes

from .strategies import shards_training_data

logger = logging.getLogger(__name__)


@dataclass
class StageSource(_DataLoaderSource):
    """A source of loaders that wraps each loader, so that its stage controls it.

    The Trainer stores the user's loaders in a private source, which this class replaces.

    Attributes:
        trainer: The running Trainer.
        stage: The stage of the run.
        temporary: Records the changes.
        part: The set of one ``_fit_train`` or ``_fit_valid``, which replaces the Trainer's.
    """

    trainer: Trainer
    stage: RunStage
    temporary: TemporaryAttributes
    part: Any = None
    # Sets the epoch of all samplers of this source and of the Brain's sampler.
    _samplers: Any = field(default=None, init=False)
    _brain_sampler: Any = field(default=None, init=False)

    def dataloader(self) -> Any:
        """Returns the wrapped loaders: one loader for training, a list for evaluation."""
        combined = self._combined()
        if self.stage.kind is not Stage.TRAIN and combined._mode == "sequential":
            return self._wrap(combined.flattened, set_names(combined.iterables))
        one = combined.iterables is combined.flattened[0]
        loader = combined.flattened[0] if one else _several(combined)
        return self._wrap([loader])[0]

    def _wrap(self, loaders: list[Any], names: Sequence[str] = ("",)) -> list[StageLoader]:
        sets = [each.part if isinstance(each, _Part) else each for each in loaders]
        wrapped = self.stage.wrap(sets, names)
        if any(loader.known_length() is None for loader in wrapped):
            _check_no_fraction(self.trainer, self.stage.kind)
        return wrapped

    def _combined(self) -> CombinedLoader:
        loaders = super().dataloader() if self.part is None else self._part()
        training = self.stage.kind is Stage.TRAIN
        if not isinstance(loaders, CombinedLoader):
            loaders = CombinedLoader(loaders, "max_size_cycle" if training else "sequential")
        fitting = self.trainer.state.fn is TrainerFn.FITTING
        if training:
            given = loaders.flattened
            if self.trainer.world_size > 1:
                if shards_training_data(self.trainer):
                    loaders.flattened = [self._sharded(loader) for loader in given]
                warn_if_whole(loaders.flattened, self.trainer)
            self._set_epochs(given, loaders.flattened)
        # Lightning's type hints lack this attribute.
        if fitting and self.trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            # Call it here, because Lightning finds no shuffling samplers in wrapped loaders.
            running = RunningStage.TRAINING if training else RunningStage.VALIDATING
            _resolve_overfit_batches(loaders, running)
        return loaders

    def _part(self) -> Any:
        is_loader = isinstance(self.part, DataLoader) or are_several(self.part)
        return self.part if is_loader else _Part(self.part)

    def _set_epochs(self, given: list[Any], iterated: list[Any]) -> None:
        """Makes the Brain call ``set_epoch`` of samplers, as Lightning does.

        Lightning does not find samplers in wrapped loaders. In ``brain.fit``, only
        ``brain.train_sampler`` is used for loaders of the user, as in SpeechBrain.
        """
        brain, of_fit = self.stage.brain, self.trainer.lightning_module.is_of_fit
        if brain.train_sampler is not self._samplers:
            # If loaders are reloaded within the run, it has been replaced already.
            self._brain_sampler = brain.train_sampler
        samplers = [
            sampler
            for old, new in zip(given, iterated, strict=True)
            if new is not old or not of_fit
            for sampler in _samplers_of(new)
        ]
        if samplers:
            self._samplers = SeveralSamplers([*samplers, self._brain_sampler])
            self.temporary.set(brain, "train_sampler", self._samplers)

    def _sharded(self, loader: Any) -> Any:
        if is_sharded(loader):
            return loader
        try:
            prepare = self.trainer._data_connector._prepare_dataloader
            sharded = prepare(loader, _is_dataloader_shuffled(loader), RunningStage.TRAINING)
        except TypeError as error:
            name = type(loader.batch_sampler).__name__
            raise UnsupportedError(
                f"the batch sampler {name} cannot be split between ranks automatically. Wrap "
                "it in brain_lightning.DistributedSamplerWrapper, or pass a dataset and "
                "train_loader_kwargs to brain.fit, or use "
                "Trainer(use_distributed_sampler=False)."
            ) from error
        if sharded is not loader:
            _recover_instead(self.stage.brain.checkpointer, loader, sharded)
        return sharded


def _samplers_of(loader: Any) -> list[Any]:
    """Returns the samplers of a loader whose ``set_epoch`` Lightning calls."""
    found = (
        getattr(loader, "sampler", None),
        getattr(getattr(loader, "batch_sampler", None), "sampler", None),
    )
    # Both may be the same object.
    return list({id(each): each for each in found if hasattr(each, "set_epoch")}.values())


# Loaders for which a warning was logged.
_WHOLE: WeakSet[Any] = WeakSet()


def warn_if_whole(loaders: list[Any], trainer: Trainer) -> None:
    """Warns once for each training loader that yields all of its data on every rank.

    Args:
        loaders: The loaders over which the Trainer iterates.
        trainer: A Trainer with several processes.
    """
    for loader in loaders:
        data = loader.loader if is_looped_loader(loader) else loader
        is_whole = isinstance(data, DataLoader) and not is_sharded(data)
        if is_whole and data not in _WHOLE and trainer.is_global_zero:
            _WHOLE.add(data)
            message = INDICES_ARE_WHOLE if has_indices(data) else STREAM_IS_WHOLE
            logger.warning(message, trainer.world_size, type(data.dataset).__name__)


INDICES_ARE_WHOLE = (
    "The training loader has no distributed sampler: each of the %d processes trains on the "
    "full %s. Pass the dataset and train_loader_kwargs to brain.fit, or a loader with a "
    "DistributedSampler, or use trainer={'use_distributed_sampler': True}. If torchrun or "
    "brain-lightning run --trainer.devices=... starts the processes, you can also create the "
    "loader before fit with brain.make_dataloader(dataset, Stage.TRAIN)."
)
STREAM_IS_WHOLE = (
    "The training stream is not split between ranks: each of the %d processes trains on the "
    "full %s, unless the dataset itself selects the examples of its rank."
)


def _recover_instead(checkpointer: Any, loader: Any, sharded: Any) -> None:
    """Replaces a loader among the recoverables by the sharded loader."""
    recoverables = getattr(checkpointer, "recoverables", {})
    for name, recoverable in recoverables.items():
        if recoverable is loader:
            recoverables[name] = sharded


@dataclass
class _Part:
    """Wraps any iterable, because Lightning would use a list as a list of loaders."""

    part: Any

    def __iter__(self) -> Iterator[Any]:
        return iter(self.part)


def _several(combined: CombinedLoader) -> SeveralLoaders:
    """Returns loaders that are combined in the mode of a CombinedLoader."""
    total = _SUPPORTED_MODES[combined._mode]["fn"]
    return SeveralLoaders(combined.flattened, partial(_combine, combined), total)


def _combine(
    combined: CombinedLoader, iterables: list[Any], again: list[bool]
) -> Iterator[Any]:
    """Iterates over iterables in the mode of a CombinedLoader, and yields batches only."""
    others = copy.copy(combined)
    others.flattened = iterables
    others.limits = None
    iter(others)
    if any(again):
        others._iterator._consumed = again  # type: ignore[union-attr]
    return map(itemgetter(0), _Begun(others))


@dataclass
class _Begun(Iterator[Any]):
    """Continues to iterate over a CombinedLoader, whose ``__iter__`` would restart it."""

    combined: CombinedLoader

    def __next__(self) -> Any:
        return next(self.combined)


# Arguments that may be a fraction of a set.
FRACTIONS = {
    Stage.TRAIN: ("limit_train_batches", "val_check_interval"),
    Stage.VALID: ("limit_val_batches",),
    Stage.TEST: ("limit_test_batches",),
}


def _check_no_fraction(trainer: Trainer, stage: Stage) -> None:
    for name in FRACTIONS[stage]:
        value = getattr(trainer, name, None)
        if isinstance(value, float) and value not in (0.0, 1.0):
            raise RunOptionError(
                f"Trainer({name}={value}) is a fraction, but the {stage.name} set has no "
                "length. Use a number of batches (an int)."
            )
