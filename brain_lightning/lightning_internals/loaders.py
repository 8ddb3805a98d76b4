"""What is private in Lightning's loops; ``_fit_loop.py`` has the fit loop itself.

Each function says which private part it needs and why nothing public serves;
``tests/lightning_internals/test_loops.py`` fails where a release moves one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.data_connector import (
    _DataLoaderSource,
    _resolve_overfit_batches,
)
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from lightning.pytorch.utilities.data import _is_dataloader_shuffled
from torch.utils.data import DistributedSampler

from brain_lightning.compat.speechbrain import redirect_validation
from brain_lightning.errors import RunOptionError, UnsupportedError
from brain_lightning.protocol import overrides
from brain_lightning.stage import Stage
from brain_lightning.stages.loader import StageLoader
from brain_lightning.stages.run import Run
from brain_lightning.stages.sharded_evaluation import share
from brain_lightning.temporary import TemporaryAttributes

from .loops import count, release_loops, rule_evaluation_loops, rule_fit_loop
from .strategies import shards_training_data


class _StageSource(_DataLoaderSource):
    """A source of loaders that puts each under the control of its stage.

    A user hands loaders to the Trainer, which keeps them in a private source.
    """

    def __init__(
        self,
        source: _DataLoaderSource,
        trainer: Trainer,
        run: Run,
        stage: Stage,
        temporary: TemporaryAttributes,
    ) -> None:
        super().__init__(source.instance, source.name)
        self.source = source
        self._temporary = temporary
        self._trainer = trainer
        self._run = run
        self._stage = stage

    def dataloader(self) -> Any:
        """The loaders, wrapped: one for training, a list for evaluation."""
        combined = self._combined()
        if self._stage is not Stage.TRAIN and combined._mode == "sequential":
            return self._wrap(combined.flattened)
        one = combined.iterables is combined.flattened[0]
        loader = combined.flattened[0] if one else SeveralLoaders(combined)
        return self._wrap([loader])[0]

    def _wrap(self, loaders: list[Any]) -> list[StageLoader]:
        wrapped = self._run.wrap(loaders, self._stage)
        if any(loader.known_length() is None for loader in wrapped):
            _refuse_fractions(self._trainer, self._stage)
        return wrapped

    def _combined(self) -> CombinedLoader:
        loaders = super().dataloader()
        training = self._stage is Stage.TRAIN
        if not isinstance(loaders, CombinedLoader):
            loaders = CombinedLoader(loaders, "max_size_cycle" if training else "sequential")
        fitting = self._trainer.state.fn is TrainerFn.FITTING
        if training and shards_training_data(self._trainer):
            self._share_out(loaders)
        # An attribute that Lightning's type hints do not show.
        if fitting and self._trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            # Lightning looks for shuffling samplers, which it would not find in ours.
            running = RunningStage.TRAINING if training else RunningStage.VALIDATING
            _resolve_overfit_batches(loaders, running)
        return loaders

    def _share_out(self, loaders: CombinedLoader) -> None:
        """Lightning's way, which does not find the loaders behind ours; the Brain counts."""
        shared = [self._shared(loader) for loader in loaders.flattened]
        samplers = _Samplers(
            new.sampler
            for old, new in zip(loaders.flattened, shared, strict=True)
            if new is not old
        )
        loaders.flattened = shared
        if samplers:
            self._temporary.set(self._run.brain, "train_sampler", samplers)

    def _shared(self, loader: Any) -> Any:
        samplers = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
        if any(isinstance(sampler, DistributedSampler) for sampler in samplers):
            return loader
        try:
            prepare = self._trainer._data_connector._prepare_dataloader
            shared = prepare(loader, _is_dataloader_shuffled(loader), RunningStage.TRAINING)
        except TypeError as error:
            name = type(samplers[1]).__name__
            raise UnsupportedError(
                f"the batch sampler {name} cannot be shared out among processes: wrap it in "
                "brain_lightning.DistributedSamplerWrapper, or give brain.fit a dataset and "
                "train_loader_kwargs, or say Trainer(use_distributed_sampler=False)"
            ) from error
        if shared is loader:
            rank_zero_warn(f"{type(loader).__name__}: every process trains on all of its data")
        else:
            _recover_instead(self._run.brain.checkpointer, loader, shared)
        return shared


def _recover_instead(checkpointer: Any, loader: Any, shared: Any) -> None:
    """A saveable loader is saved under a name; the one that is iterated takes it over."""
    recoverables = getattr(checkpointer, "recoverables", {})
    for name, recoverable in recoverables.items():
        if recoverable is loader:
            recoverables[name] = shared


class _Samplers(list[Any]):
    """The samplers of the training loaders, which learn the epoch together."""

    def set_epoch(self, epoch: int) -> None:
        for sampler in self:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)


class SeveralLoaders:
    """The batches of several loaders together, without Lightning's indices."""

    def __init__(self, combined: CombinedLoader) -> None:
        self._combined = combined

    def __len__(self) -> int:
        lengths = [len(loader) for loader in self._combined.flattened]
        return min(lengths) if self._combined._mode == "min_size" else max(lengths)

    def __iter__(self) -> Iterator[Any]:
        for batch, _, _ in iter(self._combined):
            yield batch


# Arguments that mean a part of a set where they are a fraction.
FRACTIONS = {
    Stage.TRAIN: ("limit_train_batches", "val_check_interval"),
    Stage.VALID: ("limit_val_batches",),
    Stage.TEST: ("limit_test_batches",),
}


def _refuse_fractions(trainer: Trainer, stage: Stage) -> None:
    for name in FRACTIONS[stage]:
        value = getattr(trainer, name, None)
        if isinstance(value, float) and value not in (0.0, 1.0):
            raise RunOptionError(
                f"Trainer({name}={value}) is a fraction of a {stage.name} set without a "
                "length: give a whole number of batches"
            )


def leave_signals_alone(trainer: Trainer) -> None:
    """Keeps a Trainer that ``brain.fit`` made from handling signals.

    SIGTERM would else wait for the end of the batch and exit with status 0, in
    processes that a hook forks as well.

    Args:
        trainer: The Trainer before its first run.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def is_lightnings_handler(handler: object) -> bool:
    """Whether a signal is heard by a Trainer, and by nobody else.

    Its handler would end the process with status 0, and makes a collective call from
    within the signal (Lightning 2.6, ``_sigterm_notifier_fn``).

    Args:
        handler: What ``signal.getsignal`` returned.
    """
    return isinstance(handler, _HandlersCompose) and len(handler.signal_handlers) == 1


def keep_anomaly_detection(trainer: Trainer, temporary: TemporaryAttributes) -> None:
    """Lets ``torch.autograd.detect_anomaly`` around a run stay in force within.

    Args:
        trainer: The Trainer, which would switch it off.
        temporary: Records what is changed.
    """
    if torch.is_anomaly_enabled():
        temporary.set(trainer, "_detect_anomaly", True)


def evaluation_loops(trainer: Trainer) -> list[Any]:
    """The loops of ``validate``, ``test`` and ``predict``."""
    return [trainer.validate_loop, trainer.test_loop, trainer.predict_loop]


def attach(trainer: Trainer, run: Run, temporary: TemporaryAttributes) -> None:
    """Lets the stages of a Brain rule the Trainer's loops.

    Args:
        trainer: The Trainer in its ``setup``.
        run: The run.
        temporary: Records what is changed and not left to ``detach``.
    """
    if trainer.state.fn is TrainerFn.FITTING:
        rule_fit_loop(trainer, run)
        if overrides(type(run.brain), "_fit_valid"):
            _validate_as_told(trainer, run, temporary)
    rule_evaluation_loops(trainer)
    for loop, stage in _loops_with_stages(trainer):
        loop._data_source = _StageSource(loop._data_source, trainer, run, stage, temporary)


def _validate_as_told(trainer: Trainer, run: Run, temporary: TemporaryAttributes) -> None:
    """Lets a recipe decide whether to validate, by its own ``_fit_valid``.

    Recipes override it to validate every few epochs, and call SpeechBrain's, which
    stands for Lightning's validation here. Lightning has no hook that could leave
    one out.
    """
    loop, brain = trainer.fit_loop.epoch_loop.val_loop, run.brain
    temporary.override(brain, "_validate", loop.run)
    redirect_validation(brain, temporary)

    def validate() -> None:
        loader = run.valid_loader()
        brain._fit_valid(loader, run.epochs.current, run.progressbar)

    temporary.override(loop, "run", validate)


def detach(trainer: Trainer) -> None:
    """Gives the Trainer its own loops back.

    Args:
        trainer: The Trainer at the end of a run.
    """
    release_loops(trainer)
    for loop, _ in _loops_with_stages(trainer):
        if isinstance(loop._data_source, _StageSource):
            loop._data_source = loop._data_source.source
            # The loop would keep, and reuse, the loaders of a run that is over.
            loop._combined_loader = None


def _loops_with_stages(trainer: Trainer) -> list[tuple[Any, Stage]]:
    return [
        (trainer.fit_loop, Stage.TRAIN),
        (trainer.fit_loop.epoch_loop.val_loop, Stage.VALID),
        (trainer.validate_loop, Stage.VALID),
        (trainer.test_loop, Stage.TEST),
    ]


def _limit(limit: float, length: int | None) -> float:
    """How many batches a ``limit_..._batches`` of the Trainer allows."""
    if isinstance(limit, int):
        return limit
    # A fraction of an unknown length was refused before.
    return float("inf") if limit == 1.0 or length is None else int(limit * length)


def _estimate(limit: float, length: int | None) -> float:
    """For progress bars, and for who asks whether a batch is the last."""
    return min(_limit(limit, length), float("inf") if length is None else max(1, length))


def start_train_epoch(trainer: Trainer, length: int | None) -> None:
    """Makes an epoch end by exhaustion; a length is only for those who display it.

    Lightning reads the length of the training set once, and validates where the
    count of batches divides by it: with a length that changes, an epoch is cut
    short or its validation left out.

    Args:
        trainer: The Trainer in ``on_train_epoch_start``.
        length: Batches in the epoch, where that is known.
    """
    trainer.fit_loop.max_batches = _estimate(trainer.limit_train_batches, length)
    # Not there where the interval is a time.
    interval = getattr(trainer, "val_check_interval", None)
    if isinstance(interval, float) and interval == 1.0:
        trainer.val_check_batch = float("inf")


def limited_length(trainer: Trainer, length: int | None) -> float | None:
    """How many batches an epoch of training has, where that is known.

    Args:
        trainer: Its ``limit_train_batches`` counts.
        length: Batches of the training set, or None.
    """
    return None if length is None else min(length, _limit(trainer.limit_train_batches, length))


def start_validation(trainer: Trainer, shared_out: bool) -> None:
    """Makes a validation end by exhaustion, unless a limit was asked for.

    Args:
        trainer: The Trainer at the start of a validation.
        shared_out: Whether this process has a part of the batches.
    """
    loop = trainer._evaluation_loop
    limit = trainer.limit_test_batches if trainer.testing else trainer.limit_val_batches
    combined, fetcher = loop._combined_loader, loop._data_fetcher
    assert combined is not None
    assert fetcher is not None
    lengths = [loader.known_length() for loader in combined.flattened]
    loop._max_batches = [_estimate(limit, length) for length in lengths]
    limits = [_limit(limit, length) for length in lengths]
    if shared_out:
        limits = [share(all_of_them) for all_of_them in limits]
    combined._iterator.limits = limits  # type: ignore[union-attr]
    fetcher.length, fetcher.done = None, False


def is_cut_short(trainer: Trainer, length: int | None) -> bool:
    """Whether the Trainer ends the training epoch after this batch.

    Args:
        trainer: The Trainer in ``on_train_batch_end``.
        length: Batches in the epoch, where that is known.

    Returns:
        True where ``limit_train_batches`` or ``max_steps`` is reached, or a callback
        stops the run.
    """
    loop = trainer.fit_loop
    batches = loop.epoch_loop.batch_progress.current.ready
    if batches >= _limit(trainer.limit_train_batches, length):
        return True
    if 0 <= trainer.max_steps <= trainer.global_step:
        return True
    return bool(trainer.should_stop and loop._can_stop_early)


def mark_last_batch(trainer: Trainer, last: bool) -> None:
    """Tells Lightning whether the batch that was just fitted ends the epoch.

    Args:
        trainer: The Trainer in ``on_train_batch_end``.
        last: Whether no batch follows.
    """
    loop = trainer.fit_loop
    loop.epoch_loop.batch_progress.is_last_batch = last
    if not last and loop.epoch_loop.batch_progress.current.ready >= loop.max_batches:
        loop.max_batches = float("inf")
    fetcher = loop._data_fetcher
    assert fetcher is not None
    fetcher.length, fetcher.done = None, last


def discount_step(trainer: Trainer) -> None:
    """Keeps ``trainer.global_step`` from counting a batch that made no update.

    Lightning's automatic optimization counts each call of ``optimizer_step``.

    Args:
        trainer: The Trainer at the end of ``LightningModule.optimizer_step``.
    """
    progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
    for tracker in (progress.total, progress.current):
        count(tracker, -1)


def count_step(trainer: Trainer) -> None:
    """Makes ``trainer.global_step`` count an update that Lightning has not made.

    Args:
        trainer: The Trainer in a batch of an automatic module.
    """
    progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
    for tracker in (progress.total, progress.current):
        count(tracker, 1)


def count_steps(trainer: Trainer, steps: int) -> None:
    """Makes ``trainer.global_step`` count raw ``optimizer.step()`` calls.

    Lightning's manual optimization counts the steps of its own wrappers only.

    Args:
        trainer: The Trainer in ``training_step`` of a manual module.
        steps: Steps taken in this batch.
    """
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    for tracker in (progress.total, progress.current):
        count(tracker, steps)


def run_validation(trainer: Trainer) -> None:
    """Validates after a training epoch in which there was no batch.

    Lightning only validates after a batch (``_TrainingEpochLoop.on_advance_end``).

    Args:
        trainer: The Trainer in ``on_train_epoch_end``.
    """
    loop = trainer.fit_loop.epoch_loop
    if loop._should_check_val_epoch():
        trainer.validating = True
        loop.val_loop.run()
        trainer.training = True
