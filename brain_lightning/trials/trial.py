"""Batches that a Brain fits and evaluates, after which everything is as it was."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from brain_lightning.compat import speechbrain
from brain_lightning.data.dataloaders import twin
from brain_lightning.data.several_loaders import SeveralLoaders
from brain_lightning.distributed.communication import world_size
from brain_lightning.errors import NonFiniteLossError, UnsupportedError
from brain_lightning.fsdp2.evaluate import gathered, release
from brain_lightning.phase import Phase
from brain_lightning.stages.base import RunStage
from brain_lightning.stages.metrics import scalar
from brain_lightning.stages.run import Run
from brain_lightning.step.together import fail_together
from brain_lightning.step.window import restart_window
from brain_lightning.temporary import TemporaryAttributes

from .isolation import isolate
from .snapshot import Snapshot


class Trial:
    """A trial of some batches on a snapshot of a run, as a context.

    Whatever happens in it, an error or a Ctrl-C, everything that hangs on the Brain is then
    as it was: modules, gradients, optimizers, counters, statistics, annealings, samplers and
    random states. Hooks are called as in a stage, but not ``on_stage_end``, which saves, logs
    and anneals; a Checkpointer or a train logger that they reach does nothing. No loop of
    the Trainer runs: a batch is fitted by ``fit_batch`` of the Brain.

    Args:
        run: The run, from ``on_fit_start`` on, between two batches.
        trainer: The Trainer that runs it.
        *loaders: Those that the trial iterates.
    """

    def __init__(self, run: Run, trainer: Trainer, *loaders: Any) -> None:
        self._run, self._brain, self._trainer = run, run.brain, trainer
        self._loaders = loaders
        self._restores = ExitStack()
        # In which weights that are in shards are whole.
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
                # Where they cannot: see ``fails_together``.
                with suppress(UnsupportedError):
                    fail_together(brain, temporary)
            # Where that fails, everything is restored here.
            self._restores = restores.pop_all()
        return self

    @property
    def fails_together(self) -> bool:
        """Whether all processes hear of it where one has no memory to fit a batch.

        Else those that have memory wait for the others, in the averaging of gradients: then
        the error has to end the process.
        """
        return world_size() == 1 or self._brain._lightning.fails_together

    def __exit__(self, *exception: object) -> None:
        """Restores everything; a Ctrl-C waits until that is over."""
        with _uninterrupted():
            self._restores.close()

    def start(self) -> None:
        """Starts a TRAIN stage, as ``speechbrain.Brain._fit_train`` does."""
        self._gathered.close()
        brain, self._evaluates = self._brain, None
        brain.step, brain.avg_train_loss, brain.nonfinite_count = 0, 0.0, 0
        # A trial may go where the loss is no number.
        brain.nonfinite_patience = sys.maxsize
        brain.on_stage_start(self._run.train.brain_stage, self._epoch)
        brain.modules.train()
        brain.zero_grad()
        restart_window(brain)

    def fit(self, batch: Any) -> float:
        """Fits one batch: the passes, and the step if it ends a window.

        Args:
            batch: From ``batches``.

        Returns:
            Its loss; NaN where ``fit_batch`` returns no number.

        Raises:
            torch.OutOfMemoryError: In all processes together, where they can
                (``step/together.py``).
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
            stage: The stage of the run.
            set_name: Of the set, where there are several.
        """
        brain, self._evaluates = self._brain, stage
        self._gathered.enter_context(gathered(brain))
        brain._lightning.set_name = set_name
        epoch = None if stage is self._run.test else self._epoch
        brain.on_stage_start(stage.brain_stage, epoch)
        brain.modules.eval()

    def evaluate(self, batch: Any) -> float:
        """Evaluates one batch; the first one starts VALID, if no evaluation has started.

        Args:
            batch: From ``batches``.

        Returns:
            Its loss; NaN where ``evaluate_batch`` returns no number.
        """
        if self._evaluates is None:
            self.start_evaluation(self._run.valid)
        assert self._evaluates is not None
        with torch.no_grad():
            loss = self._brain.evaluate_batch(batch, stage=self._evaluates.brain_stage)
        return _number(loss)

    def batches(self, loader: Any) -> Iterator[Any]:
        """One pass over a loader, whose own position stays where it is.

        Args:
            loader: What ``fit`` was given.

        Yields:
            The batches, on the device of the Brain.

        Raises:
            UnsupportedError: It can be iterated once only.
        """
        for batch in _iterate(loader):
            yield self._trainer.strategy.batch_to_device(batch)

    @property
    def _epoch(self) -> Any:
        """The number of the epoch that comes, or has just begun."""
        epochs = self._run.epochs
        current = getattr(epochs.counter, "current", epochs.current)
        if self._run.run_state.phase is Phase.STARTING:
            return current
        return (current if isinstance(current, int) else 0) + 1


@contextmanager
def _uninterrupted() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        # Nothing that Python could call later, or nobody who is interrupted.
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


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
    """A copy of a loader, with workers of its own, that is iterated from the beginning."""
    if speechbrain.is_looped_loader(loader):
        return _fresh(loader.loader)
    if isinstance(loader, DataLoader):
        return twin(loader, persistent_workers=False)
    if isinstance(loader, Iterator):
        raise UnsupportedError(
            f"{type(loader).__name__} can be iterated once, and batches that are tried would "
            "be missing in the training: give fit a DataLoader or a list"
        )
    return loader
