"""``fit`` and ``evaluate`` of a Brain, brain_lightning's or SpeechBrain's, on a Trainer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader

from brain_lightning.checkpoints.checkpoint import Checkpoint
from brain_lightning.data import dataloaders as data
from brain_lightning.data.several_loaders import (
    SeveralSamplers,
    are_several,
    map_sets,
    set_names,
)
from brain_lightning.errors import BrainTypeError, NoSuchCheckpointError
from brain_lightning.module.named_checkpoint import Recovery, named_checkpoint
from brain_lightning.module.to_lightning import to_lightning
from brain_lightning.protocol import BrainProtocol
from brain_lightning.stages.run import Run, is_last_epoch

from . import own_trainer as trainers
from .own_fit import is_on_trainer, on_trainer, run_part

logger = logging.getLogger(__name__)


class FitAndEvaluate:
    """``speechbrain.Brain.fit`` and ``evaluate``, run by Lightning's Trainer."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes a ``fit`` that the subclass overrides run on one Trainer."""
        super().__init_subclass__(**kwargs)
        if not is_on_trainer(cls.fit, FitAndEvaluate.fit):
            cls.fit = on_trainer(cls.fit)  # type: ignore[method-assign]

    def fit(
        self: BrainProtocol,
        epoch_counter: Iterable[Any],
        train_set: Any,
        valid_set: Any = None,
        progressbar: bool | None = None,
        train_loader_kwargs: Mapping[str, Any] = {},
        valid_loader_kwargs: Mapping[str, Any] = {},
        *,
        trainer: Trainer | Mapping[str, Any] | None = None,
    ) -> None:
        """Iterates epochs and datasets to improve the objective.

        Args:
            epoch_counter: Iterable over the epoch numbers.
            train_set: A DataLoader or a dataset. Several training sets are passed in a dict, a
                list or a CombinedLoader; Lightning combines their batches.
            valid_set: A DataLoader or a dataset for validation. Several sets are passed in a
                dict or a list; each has a separate VALID stage. None skips validation.
            progressbar: Whether to show a progress bar; default: not ``noprogressbar``.
            train_loader_kwargs: Arguments of the training DataLoader.
            valid_loader_kwargs: Arguments of the validation DataLoader.
            trainer: A Trainer, or arguments for one; default: ``hparams["trainer"]``.
                ``--trainer.X=Y`` on the command line takes precedence over both.

        Raises:
            BrainTypeError: If ``epoch_counter`` is None, or ``trainer`` is neither a Trainer
                nor a dict.
        """
        if epoch_counter is None:
            raise BrainTypeError(
                "epoch_counter is None. Use EpochCounter(limit=10) or range(10)."
            )
        if self.test_only:
            logger.info("Test only mode, skipping training and validation stages.")
            return
        parts = Run.parts_of(self)
        within_own = parts is not None and parts.may_train
        running = None if within_own else trainers.trainer_for(self, trainer)
        stage = self._lightning.stage_type
        train_set = _train_loaders(self, train_set, train_loader_kwargs)
        if valid_set is not None:
            kwargs = {"ckpt_prefix": None, **valid_loader_kwargs}
            valid_set = _loaders(self, valid_set, stage.VALID, kwargs)
        shows_bar = _shows_bar(self, progressbar)
        if running is None:
            _fit_within_own_fit(self, epoch_counter, train_set, valid_set, shows_bar)
            return
        module = to_lightning(self, epoch_counter=epoch_counter, progressbar=shows_bar)
        module.is_of_fit = True
        trainers.run(running, module, lambda: running.fit(module, train_set, valid_set))

    def _fit_train(self: BrainProtocol, train_set: Any, epoch: Any, enable: bool) -> None:
        """Runs one TRAIN stage, as ``fit`` does in each epoch.

        Recipes call it in an overridden ``fit``, which then runs on one Trainer. A call
        outside of ``fit`` creates a separate Trainer.

        Args:
            train_set: Iterable over batches.
            epoch: The number of the epoch.
            enable: Whether to show a progress bar.
        """
        run_part(self, "train", train_set, epoch, enable)

    def _fit_valid(self: BrainProtocol, valid_set: Any, epoch: Any, enable: bool) -> None:
        """Runs one VALID stage, as ``fit`` does in each epoch; see ``_fit_train``.

        Args:
            valid_set: Iterable over batches; None skips validation.
            epoch: The number of the epoch.
            enable: Whether to show a progress bar.
        """
        run_part(self, "valid", valid_set, epoch, enable)

    def evaluate(
        self: BrainProtocol,
        test_set: Any,
        max_key: str | None = None,
        min_key: str | None = None,
        progressbar: bool | None = None,
        test_loader_kwargs: Mapping[str, Any] = {},
        *,
        trainer: Trainer | Mapping[str, Any] | None = None,
        ckpt: str | PathLike[str] | Recovery | None = Recovery.BY_KEYS,
    ) -> Any:
        """Evaluates on a dataset, by default with the best checkpoint.

        Args:
            test_set: A DataLoader or a dataset. Several sets are passed in a dict or a list;
                each has a separate TEST stage.
            max_key: Argument of ``on_evaluate_start``.
            min_key: Argument of ``on_evaluate_start``.
            progressbar: Whether to show a progress bar; default: not ``noprogressbar``.
            test_loader_kwargs: Arguments of the DataLoader.
            trainer: As for ``fit``.
            ckpt: Name of a checkpoint in the Checkpointer's folder, or path of a checkpoint.
                ``on_evaluate_start`` then finds only this checkpoint. None evaluates the
                modules without recovering anything, and skips ``on_evaluate_start``.

        Returns:
            The average loss, or a dict or a list of average losses for several sets.

        Raises:
            NoSuchCheckpointError: If the checkpoint does not exist, or if ``ckpt`` is given
                together with a key.
        """
        recovers = _recovers(self, ckpt, max_key, min_key)
        running = trainers.trainer_for(self, trainer, collective=False)
        kwargs = {**test_loader_kwargs, "ckpt_prefix": None}
        loaders = _loaders(self, test_set, self._lightning.stage_type.TEST, kwargs)
        shows_bar = _shows_bar(self, progressbar)
        module = to_lightning(self, progressbar=shows_bar, max_key=max_key, min_key=min_key)
        module.recovers = recovers
        trainers.run(running, module, lambda: running.test(module, loaders, verbose=False))
        averages = iter(module.run.test.averages)
        return map_sets(lambda _: next(averages, 0.0), test_set)


def _loaders(brain: BrainProtocol, sets: Any, stage: Any, kwargs: Mapping[str, Any]) -> Any:
    """Returns a loader for each set to evaluate."""

    def loader(each: Any) -> Any:
        is_loader = data.is_loader(each)
        return each if is_loader else brain.make_dataloader(each, stage=stage, **kwargs)

    return map_sets(loader, sets)


def _train_loaders(brain: BrainProtocol, sets: Any, kwargs: Mapping[str, Any]) -> Any:
    """Returns a training loader for each set; one ``set_epoch`` reaches all samplers."""
    samplers: list[Any] = []
    prefixes = iter(set_names(sets) if are_several(sets) else [""])

    def loader(each: Any) -> Any:
        name = next(prefixes)
        if data.is_loader(each) or isinstance(each, CombinedLoader):
            return each
        of_name = {"ckpt_prefix": f"dataloader-{name}-"} if name else {}
        stage = brain._lightning.stage_type.TRAIN
        made = brain.make_dataloader(each, stage=stage, **{**of_name, **kwargs})
        samplers.append(brain.train_sampler)
        return made

    loaders = map_sets(loader, sets)
    if len(samplers) > 1:
        brain.train_sampler = SeveralSamplers(samplers)
    return loaders


def _fit_within_own_fit(
    brain: BrainProtocol,
    epoch_counter: Iterable[Any],
    train_set: Any,
    valid_set: Any,
    bar: bool,
) -> None:
    """Runs the epochs of ``speechbrain.Brain.fit`` within the run of an overridden ``fit``."""
    brain.on_fit_start()
    for epoch in epoch_counter:
        brain._fit_train(train_set=train_set, epoch=epoch, enable=bar)
        brain._fit_valid(valid_set=valid_set, epoch=epoch, enable=bar)
        if is_last_epoch(brain, epoch):
            break


def _recovers(
    brain: BrainProtocol,
    ckpt: str | PathLike[str] | Recovery | None,
    max_key: str | None,
    min_key: str | None,
) -> Checkpoint | Recovery | None:
    if isinstance(ckpt, Recovery):
        return ckpt
    if max_key is not None or min_key is not None:
        raise NoSuchCheckpointError(
            f"evaluate(ckpt={ckpt!r}, max_key={max_key!r}, min_key={min_key!r}) has more than "
            "one argument that selects a checkpoint. Pass only one of ckpt, max_key, min_key."
        )
    return None if ckpt is None else named_checkpoint(brain, ckpt)


def _shows_bar(brain: BrainProtocol, progressbar: bool | None) -> bool:
    return not brain.noprogressbar if progressbar is None else progressbar
