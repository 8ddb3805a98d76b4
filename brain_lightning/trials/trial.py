"""Fits and evaluates batches, and restores everything afterwards."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from brain_lightning.compat import speechbrain
from brain_lightning.data.dataloaders import twin
from brain_lightning.data.several_loaders import SeveralLoaders
from brain_lightning.distributed.communication import world_size
from brain_lightning.distributed.termination import uninterrupted
from brain_lightning.errors import NonFiniteLossError, UnsupportedError
from brain_lightning.fsdp2.evaluate import gathered, release
from brain_lightning.phase import Phase
from brain_lightning.stages.base import RunStage
from brain_lightning.stages.metrics import scalar
from brain_lightning.stages.run import Run
from brain_lightning.step.synchronized import synchronize_oom
from brain_lightning.step.window import restart_window
from brain_lightning.temporary import TemporaryAttributes

from .isolation import isolate
from .snapshot import Snapshot


class Trial:
    """Context manager that runs batches and restores the run when it exits.

    It restores everything that is reachable from the Brain, also after an error or Ctrl-C:
    modules, gradients, optimizers, counters, statistics, annealings, samplers and random
    states. Hooks are called as in a stage, except for ``on_stage_end``, which saves, logs and
    anneals. Checkpointers and train loggers do nothing. The Trainer's loops do not run: the
    Brain's ``fit_batch`` fits a batch.

    Args:
        run: The run, after ``on_fit_start``, between two batches.
        trainer: The Trainer that runs it.
        *loaders: DataLoaders that the trial iterates.
    """

    def __init__(self, run: Run, trainer: Trainer, *loaders: Any) -> None:
        self._run, self._brain, self._trainer = run, run.brain, trainer
        self._loaders = loaders
        self._restores = ExitStack()
        # Gathers sharded weights during an evaluation.
        self._gathered = ExitStack()
        self._evaluates: RunStage | None = None

    def __enter__(self) -> Trial:
        """Takes the snapshot."""
        brain = self._brain
        # Before a TEST stage, weights are gathered: their memory is freed after the trial.
        release(brain)
        snapshot = Snapshot(brain, *self._loaders)
        with ExitStack() as restores:
            restores.callback(snapshot.restore)
            temporary = restores.enter_context(TemporaryAttributes())
            restores.enter_context(self._gathered)
            isolate(brain, snapshot.objects, temporary)
            temporary.enter_context(torch.enable_grad())
            if world_size() > 1:
                # If this is not supported, ``fails_together`` is False.
                with suppress(UnsupportedError):
                    synchronize_oom(brain, temporary)
            # If an error was raised above, the ``with`` block has restored everything.
            self._restores = restores.pop_all()
        return self

    @property
    def fails_together(self) -> bool:
        """Whether all ranks raise an out-of-memory error together.

        Otherwise the other ranks hang while they average gradients, so the error has to end
        the process.
        """
        return world_size() == 1 or self._brain._lightning.synchronizes_oom

    def __exit__(self, *exception: object) -> None:
        """Restores everything. Ctrl-C is delayed until this is finished."""
        with uninterrupted():
            self._restores.close()

    def start(self) -> None:
        """Starts a TRAIN stage, as ``speechbrain.Brain._fit_train`` does."""
        self._gathered.close()
        brain, self._evaluates = self._brain, None
        brain.step, brain.avg_train_loss, brain.nonfinite_count = 0, 0.0, 0
        # A trial may try settings for which the loss is not finite.
        brain.nonfinite_patience = sys.maxsize
        brain.on_stage_start(self._run.train.brain_stage, self._epoch)
        brain.modules.train()
        brain.zero_grad()
        restart_window(brain)

    def fit(self, batch: Any) -> float:
        """Fits one batch, with an optimizer step if it ends an accumulation window.

        Args:
            batch: Batch from ``batches``.

        Returns:
            The loss, or NaN if ``fit_batch`` returns no number.

        Raises:
            torch.OutOfMemoryError: The batch does not fit into memory. All ranks raise it
                together if ``fails_together`` is True.
        """
        brain = self._brain
        brain.step += 1
        try:
            loss = brain.fit_batch(batch)
        except NonFiniteLossError:
            return float("nan")
        return _number(loss)

    def start_evaluation(self, stage: RunStage, set_name: str = "") -> None:
        """Starts VALID or TEST, as ``speechbrain.Brain._fit_valid`` and ``evaluate`` do.

        Args:
            stage: Stage of the run.
            set_name: Name of the set, if there are several sets.
        """
        brain, self._evaluates = self._brain, stage
        self._gathered.enter_context(gathered(brain))
        brain._lightning.set_name = set_name
        epoch = None if stage is self._run.test else self._epoch
        brain.on_stage_start(stage.brain_stage, epoch)
        brain.modules.eval()

    def evaluate(self, batch: Any) -> float:
        """Evaluates one batch. If no evaluation has started, it starts VALID first.

        Args:
            batch: Batch from ``batches``.

        Returns:
            The loss, or NaN if ``evaluate_batch`` returns no number.
        """
        if self._evaluates is None:
            self.start_evaluation(self._run.valid)
        assert self._evaluates is not None
        with torch.no_grad():
            loss = self._brain.evaluate_batch(batch, stage=self._evaluates.brain_stage)
        return _number(loss)

    def batches(self, loader: Any) -> Iterator[Any]:
        """Yields the batches of one pass over a DataLoader, without changing its position.

        Args:
            loader: DataLoader or iterable that was passed to ``fit``.

        Yields:
            Batches on the device of the Brain.

        Raises:
            UnsupportedError: The iterable can be iterated only once.
        """
        for batch in _iterate(loader):
            yield self._trainer.strategy.batch_to_device(batch)

    @property
    def _epoch(self) -> Any:
        """The number of the next epoch, or of the epoch that has just started."""
        epochs = self._run.epochs
        current = getattr(epochs.counter, "current", epochs.current)
        if self._run.run_state.phase is Phase.STARTING:
            return current
        return (current if isinstance(current, int) else 0) + 1


def _number(loss: Any) -> float:
    found = scalar(loss)
    if found is not None:
        return found.item()
    return float(loss) if isinstance(loss, (int, float)) else float("nan")


def _iterate(loader: Any) -> Iterable[Any]:
    if isinstance(loader, SeveralLoaders):
        each = [_fresh(one) for one in loader.loaders]
        return loader.combine(each, [False] * len(each))
    found: Iterable[Any] = _fresh(loader)
    return found


def _fresh(loader: Any) -> Any:
    """Returns a copy of a DataLoader with separate workers, at the first batch."""
    if speechbrain.is_looped_loader(loader):
        return _fresh(loader.loader)
    if isinstance(loader, DataLoader):
        return twin(loader, persistent_workers=False)
    if isinstance(loader, Iterator):
        raise UnsupportedError(
            f"{type(loader).__name__} can be iterated only once, so training would not get "
            "the batches of a trial. Pass a DataLoader or a list to fit."
        )
    return loader
