"""SpeechBrain's order of events, cut at the places where Lightning calls.

Read together, the methods are ``speechbrain.Brain._fit_train``, ``_fit_valid``
and ``evaluate``; which Lightning hook calls which is said in ``callback.py``
and ``module.py``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch

from brain_lightning.distributed.communication import on_any_rank, world_size
from brain_lightning.distributed.termination import EXIT_STATUS, Termination
from brain_lightning.protocol import BrainProtocol
from brain_lightning.resume.run_state import RunState
from brain_lightning.stage import Stage
from brain_lightning.temporary import TemporaryAttributes

from .epochs import Epochs
from .error_context import add_place, calls_hooks
from .interval_checkpoints import IntervalCheckpoints
from .loader import Pass, StageLoader
from .metrics import Metrics, staged
from .progress import LossBar, LossLines, progress_bar
from .sharded_evaluation import Shard, SharedStatistics, shared_average, synchronize_buffers

logger = logging.getLogger(__name__)


class Run:
    """The stages of one run of a Brain: one ``fit`` or one ``evaluate``.

    Args:
        brain: The Brain that runs.
        epochs: Its epochs.
        run_state: What is saved of the run.
        progressbar: Whether to show SpeechBrain's bar.
        max_key: For ``on_evaluate_start``.
        min_key: For ``on_evaluate_start``.

    Attributes:
        stage: The stage that runs or ran last.
        average: The average loss of the evaluation stage that runs or ran last.
        in_training: Whether a TRAIN stage has started and not ended.
        steps_on_last_batch: Whether an incomplete accumulation window makes an update.
        batches: Training batches so far; ``train_loss`` is that of the last one.
        draws_together: Whether processes may run out of data at different batches.
        save_with_trainer: Saves within an epoch where the Brain has no Checkpointer.
        termination: Hears a SIGTERM.
        interrupt: The Ctrl-C that ended the run, of which Lightning makes a SystemExit.
        metrics: The numbers found in the stages.
        told: The callbacks of which was told that not all of them is saved.
    """

    # Runs whose batch is being fitted; a recipe may fit another Brain within.
    _fitting: ClassVar[list[Run]] = []
    # Runs that go on.
    _running: ClassVar[list[Run]] = []

    def __init__(
        self,
        brain: BrainProtocol,
        epochs: Epochs,
        run_state: RunState,
        *,
        progressbar: bool = False,
        max_key: str | None = None,
        min_key: str | None = None,
    ) -> None:
        self.brain = brain
        self.epochs = epochs
        self.run_state = run_state
        self.progressbar = progressbar
        self.stage = Stage.TRAIN
        self.told: set[str] = set()
        self.metrics = Metrics(lambda: self.stage)
        self.average = 0.0
        self.in_training = False
        self.steps_on_last_batch = False
        self.batches = 0
        self.train_loss: Any = None
        # The error that was located last, by its id: it must not be kept.
        self._located: int | None = None
        self.draws_together = False
        self.save_with_trainer: Callable[[], None] | None = None
        self.termination = Termination()
        self.interrupt: KeyboardInterrupt | None = None
        self._train_step = 0
        self._position = 0
        self._keys = {"max_key": max_key, "min_key": min_key}
        self._loaders: dict[Stage, list[StageLoader]] = {stage: [] for stage in Stage}
        # Lightning disables gradients before it says that a stage starts.
        self._grad_enabled = torch.is_grad_enabled()

    @classmethod
    def is_running(cls, brain: BrainProtocol) -> bool:
        """Whether a run of a Brain goes on, so that one that begins is within it.

        Args:
            brain: The Brain.
        """
        return any(run.brain is brain for run in cls._running)

    def begin(self) -> None:
        """Says that the run goes on, until ``close``."""
        self._running.append(self)

    def wrap(self, loaders: Sequence[Iterable[Any]], stage: Stage) -> list[StageLoader]:
        """Puts a stage's loaders under the control of the stage.

        Args:
            loaders: What the Trainer was given for the stage.
            stage: The stage.

        Returns:
            What the Trainer is to iterate.
        """
        if stage is Stage.TRAIN:
            wrapped = [StageLoader(loader, self._train_batches) for loader in loaders]
        else:
            wrapped = [
                StageLoader(
                    loader,
                    functools.partial(
                        self._evaluation_batches, stage=stage, position=position
                    ),
                )
                for position, loader in enumerate(loaders)
            ]
        self._loaders[stage] = wrapped
        return wrapped

    @property
    def train_loader(self) -> StageLoader:
        """The loader of the TRAIN stage."""
        return self._loaders[Stage.TRAIN][-1]

    def valid_loader(self) -> Any:
        """What ``fit`` was given to validate on, or None before it was looked at."""
        loaders = [loader.loader for loader in self._loaders[Stage.VALID]]
        return loaders[0] if len(loaders) == 1 else loaders or None

    def close(self) -> None:
        """Ends the run, and every pass: no worker process and no bar is left behind."""
        if self in self._running:
            self._running.remove(self)
        for loaders in self._loaders.values():
            for loader in loaders:
                loader.close()

    # ------------------------------------------------------------------ TRAIN

    @calls_hooks
    def start_train(self) -> None:
        """Begins the TRAIN stage of the next epoch."""
        brain, epoch = self.brain, self.epochs.start()
        self.in_training = True
        self.stage = Stage.TRAIN
        self.run_state.begin_epoch(self.train_loader.loader)
        brain.on_stage_start(self._named(Stage.TRAIN), epoch)
        brain.modules.train()
        brain.zero_grad()
        brain.nonfinite_count = 0
        if hasattr(brain.train_sampler, "set_epoch"):
            brain.train_sampler.set_epoch(epoch)
        self._start_loaders(Stage.TRAIN)

    @calls_hooks
    def fit(self, batch: Any, fit_batch: Callable[[Any], Any], last: bool) -> Any:
        """Counts a training batch, fits it and averages its loss.

        Args:
            batch: What the loader gave.
            fit_batch: Does the work.
            last: Whether the Trainer believes it to be the last of the epoch.

        Returns:
            The detached loss.
        """
        brain, state = self.brain, self.run_state
        brain.step += 1
        brain.ends_window = last and self.steps_on_last_batch
        self._fitting.append(self)
        state.begin_batch()
        try:
            loss = fit_batch(batch)
        finally:
            self._fitting.pop()
        self.train_loss = loss
        brain.avg_train_loss = brain.update_average(loss, brain.avg_train_loss)
        state.end_batch()
        self.batches += 1
        return loss

    @property
    def is_innermost(self) -> bool:
        """Whether it is this run's batch that is being fitted, and none of one within."""
        return self._fitting[-1] is self

    def draw(self) -> bool:
        """Draws the next training batch.

        Returns:
            Whether there is one, here and in all other processes.
        """
        drawn = self.train_loader.advance()
        if not self.draws_together or not on_any_rank(not drawn, self.brain.device):
            return drawn
        if drawn:
            logger.warning(
                "Another process has no training batch left after %d: the epoch ends for all.",
                self.run_state.position.fitted,
            )
        return False

    @calls_hooks
    def end_train(self) -> None:
        """Ends the TRAIN stage."""
        brain = self.brain
        self.train_loader.close()
        brain.zero_grad(set_to_none=True)
        self.run_state.end_training()
        stage = self._named(Stage.TRAIN)
        brain.on_stage_end(stage, brain.avg_train_loss, self.epochs.current)
        self.metrics.add(Stage.TRAIN, {"loss": brain.avg_train_loss})
        brain.avg_train_loss = 0.0
        brain.step = 0
        brain.ends_window = False
        self.in_training = False

    def end_epoch(self) -> None:
        """Decides, after validation, whether another epoch may follow."""
        brain = self.brain
        self.run_state.end_epoch()
        if (
            brain.debug and self.epochs.current == brain.debug_epochs
        ) or self._limit_reached():
            self.epochs.stop()

    def _train_batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """``for batch in train_set`` of ``_fit_train``; the Trainer fits where it yields."""
        brain = self.brain
        checkpoints = IntervalCheckpoints(brain, self.save_with_trainer)
        batches = Pass(loader, self.run_state.batches, self._locate_fetch)
        with self._bar(batches, Stage.TRAIN) as bar:
            for batch in bar:
                if self._limit_reached():
                    logger.info("Train iteration limit exceeded")
                    return
                yield batch
                if brain.debug and brain.step == brain.debug_batches:
                    return
                checkpoints.after_step()
                self.end_if_terminated()

    def end_if_terminated(self) -> None:
        """Saves and ends the process, if it was told to; called between two batches.

        Raises:
            SystemExit: With a status that is not zero.
        """
        brain = self.brain
        if not self.termination.is_requested(brain.device):
            return
        temporary = TemporaryAttributes()
        for name, value in self.run_state.counts().items():
            temporary.set(brain, name, value)
        IntervalCheckpoints(brain, self.save_with_trainer).save()
        temporary.restore()
        self.termination.acknowledge()
        logger.warning(
            "SIGTERM: the run is saved, within epoch %s, and ends.", self.epochs.current
        )
        raise SystemExit(EXIT_STATUS)

    def running_loss(self, stage: Stage) -> dict[str, float]:
        """The average loss so far of a stage that runs, by the name of its metric.

        Args:
            stage: The stage.

        Returns:
            Nothing before its first batch.
        """
        average = self.brain.avg_train_loss if stage is Stage.TRAIN else self.average
        return {staged(stage, "loss"): average} if self.brain.step else {}

    def _bar(self, batches: Iterable[Any], stage: Stage) -> LossBar | LossLines:
        loss = functools.partial(self.running_loss, stage)
        epoch, shown = self._epoch_of(stage), self.progressbar
        return progress_bar(self.brain, batches, stage, epoch, loss, shown)

    def locate(self, error: Exception, batch: Any = None, next_is: str = "") -> None:
        """Adds to an error which stage, epoch, step and batch it comes from, once.

        Args:
            error: The error.
            batch: The batch in hand.
            next_is: What is done with the next batch, where it is before its step.
        """
        if id(error) == self._located:
            return
        self._located = id(error)
        step = self.brain.step + bool(next_is)
        epoch = self._epoch_of(self.stage)
        add_place(error, self.stage, epoch, {next_is or "step": step}, batch)

    def _locate_fetch(self, error: Exception) -> None:
        self.locate(error, next_is="fetching batch")

    def _limit_reached(self) -> bool:
        limit = self.brain.optimizer_step_limit
        return limit is not None and self.brain.optimizer_step >= limit

    # --------------------------------------------------------- VALID and TEST

    @calls_hooks
    def start_valid(self) -> None:
        """Begins the VALID stage, of the first loader where there are several."""
        self.run_state.begin_validation()
        if self.in_training:
            # A Trainer may validate in the middle of an epoch: VALID counts from 0.
            self._train_step, self.brain.step = self.brain.step, 0
        self._start_loaders(Stage.VALID)
        self._start_evaluation(Stage.VALID)

    @calls_hooks
    def end_valid(self) -> None:
        """Ends the VALID stage, of the last loader where there are several."""
        self._end_evaluation(Stage.VALID)
        self.run_state.end_validation()
        if self.in_training:
            self.stage = Stage.TRAIN
            self.brain.step = self._train_step
            self.brain.modules.train()

    @calls_hooks
    def recover_best(self) -> None:
        """Begins an evaluation."""
        self.stage = Stage.TEST
        with torch.set_grad_enabled(self._grad_enabled):
            self.brain.on_evaluate_start(**self._keys)

    @calls_hooks
    def start_test(self) -> None:
        """Begins the TEST stage, of the first loader where there are several."""
        self._start_loaders(Stage.TEST)
        self._start_evaluation(Stage.TEST)

    @calls_hooks
    def end_test(self) -> None:
        """Ends the TEST stage."""
        self._end_evaluation(Stage.TEST)

    @calls_hooks
    def evaluate(self, batch: Any, stage: Stage) -> Any:
        """Counts a batch, evaluates it and averages its loss.

        Args:
            batch: What the loader gave.
            stage: VALID or TEST.

        Returns:
            The detached loss.
        """
        brain = self.brain
        brain.step += 1
        loss = brain.evaluate_batch(batch, stage=self._named(stage))
        self.average = brain.update_average(loss, self.average)
        if self.is_shared_out(stage):
            self._shared.after_batch()
        if stage is Stage.VALID and world_size() == 1:
            # Several processes may have different numbers of batches: they end before.
            self.end_if_terminated()
        return loss

    def _start_evaluation(self, stage: Stage) -> None:
        self.stage = stage
        with torch.set_grad_enabled(self._grad_enabled):
            self.brain.on_stage_start(self._named(stage), self._epoch_of(stage))
        self.brain.modules.eval()
        self.average = 0.0
        if self.is_shared_out(stage):
            synchronize_buffers(self.brain)
            self._shared = SharedStatistics(self.brain)

    def _end_evaluation(self, stage: Stage) -> None:
        brain = self.brain
        if self.is_shared_out(stage):
            self.average = shared_average(self.average, brain.step)
            self._shared.gather()
        # A Trainer's limit leaves the pass unfinished, with its workers and its bar.
        self._loaders[stage][self._position].close()
        # SpeechBrain's order: fit() resets the step before the hook, evaluate() after it.
        if stage is Stage.VALID:
            brain.step = 0
        brain.on_stage_end(self._named(stage), self.average, self._epoch_of(stage))
        brain.step = 0
        self.metrics.add(stage, {"loss": self.average})
        if len(self._loaders[stage]) > 1:
            self.metrics.tell_apart(stage, self._position)

    def is_shared_out(self, stage: Stage) -> bool:
        """Whether this process has a part of the batches of a stage.

        Args:
            stage: The stage; in TEST each process is by itself, or one alone.
        """
        return stage is Stage.VALID and self.brain.shard_eval and world_size() > 1

    def _named(self, stage: Stage) -> Any:
        """The stage in the Brain's own enumeration: a recipe may compare with ``is``."""
        return self.brain.stage_type[stage.name]

    def _epoch_of(self, stage: Stage) -> Any:
        return None if stage is Stage.TEST else self.epochs.current

    def _evaluation_batches(
        self, loader: Iterable[Any], stage: Stage, position: int
    ) -> Iterator[Any]:
        """``for batch in valid_set`` of ``_fit_valid`` and ``evaluate``.

        Each loader is a stage of its own; Lightning has no hook between two, but
        asks the second for its first batch when it is done with the first.
        """
        if position:
            self._end_evaluation(stage)
            self._position = position
            self._start_evaluation(stage)
        brain = self.brain
        begin: Callable[[Any], Iterator[Any]] = iter
        if self.is_shared_out(stage):
            loader = Shard(loader)
        elif stage is Stage.VALID:
            begin = functools.partial(self.run_state.validation_batches, index=position)
        with self._bar(Pass(loader, begin, self._locate_fetch), stage) as bar:
            for batch in bar:
                yield batch
                if brain.debug and brain.step == brain.debug_batches:
                    return

    def _start_loaders(self, stage: Stage) -> None:
        self._position = 0
        for loader in self._loaders[stage]:
            loader.start()
