"""The VALID and TEST stages of a run: ``speechbrain.Brain._fit_valid`` and ``evaluate``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import torch

from brain_lightning.distributed.communication import world_size
from brain_lightning.fsdp2.evaluate import gathered
from brain_lightning.phase import Phase
from brain_lightning.protocol import has_own
from brain_lightning.stage import Stage
from brain_lightning.step.losses import evaluation_loss
from brain_lightning.step.precision import device_type

from . import sharded_evaluation as sharding
from .base import RunStage
from .error_context import with_error_context
from .running_average import RunningAverage

if TYPE_CHECKING:
    from .run import Run


class EvaluationStage(RunStage):
    """VALID or TEST. Of several loaders, each is a stage.

    Attributes:
        averages: Those of the stages that are over, one for each loader.
        is_part: Whether the recipe runs it, by ``_fit_valid``, rather than the Trainer.
    """

    averages: Sequence[float] = ()
    is_part = False
    _position = 0
    _waits_for_losses = True

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        # Where modules are sharded, from after on_stage_start until after on_stage_end.
        self._gathered = ExitStack()
        self._running_average = RunningAverage(self.brain)

    @property
    def average(self) -> float:
        """The average loss of the stage that is running or ran last."""
        return self._running_average.value()

    @average.setter
    def average(self, value: float) -> None:
        self._running_average.restart(value)

    def close(self) -> None:
        """See ``RunStage.close``."""
        super().close()
        self._gathered.close()

    @with_error_context
    def start(self) -> None:
        """Starts the stage, of the first loader where there are several."""
        self._position, self.averages = 0, ()
        for loader in self.loaders:
            loader.start()
        self._start()

    @with_error_context
    def end(self) -> None:
        """Ends the stage, of the last loader where there are several."""
        self._go_on_to(len(self.loaders) - 1)
        self._end()
        self.brain._lightning.set_name = ""

    def _go_on_to(self, position: int) -> None:
        """Ends the stage of one loader and starts that of another one.

        Lightning passes over those of which a limit leaves no batch for this process.
        """
        while self._position < position:
            self._end()
            self._position += 1
            self._start()

    @with_error_context
    def evaluate(self, batch: Any) -> Any:
        """Counts a batch, evaluates it and averages its loss.

        Args:
            batch: What the loader gave.

        Returns:
            The detached loss; of the default ``evaluate_batch`` on the Brain's device.
        """
        brain = self.brain
        brain.step += 1
        if self._waits_for_losses:
            loss = brain.evaluate_batch(batch, stage=self.brain_stage)
        else:
            loss = evaluation_loss(brain, batch, self.brain_stage)
        self._running_average.update(loss)
        self._after_batch()
        return loss

    def _after_batch(self) -> None:
        pass

    def _start(self) -> None:
        self.run.current = self
        self.average = 0.0
        self.brain._lightning.set_name = self.set_names[self._position]
        if self.by_recipe is not None:
            return
        if not self.is_part:
            # SpeechBrain's evaluate goes on from the step of a checkpoint within an epoch.
            self.brain.step = 0
        with torch.set_grad_enabled(self.run.grad_enabled):
            self.brain.on_stage_start(self.brain_stage, self.epoch)
        self._waits_for_losses = self._must_wait()
        self.brain.modules.eval()
        self.gather()

    def _must_wait(self) -> bool:
        """Whether a loss is needed at once, or is there at once."""
        overridden = any(has_own(self.brain, h) for h in ("evaluate_batch", "update_average"))
        return overridden or device_type(self.brain.device) == "cpu"

    def gather(self) -> None:
        """Makes weights that are in shards whole until the stage, or the run, is over."""
        self._gathered.enter_context(gathered(self.brain))

    def _end(self) -> None:
        brain, metrics = self.brain, self.run.metrics
        # A Trainer's limit leaves the pass unfinished, with its workers and its bar.
        self.loaders[self._position].close()
        if self.by_recipe is not None:
            return
        # SpeechBrain's order: fit() resets the step before the hook, evaluate() after it.
        if self.kind is Stage.VALID:
            brain.step = 0
        # Twice, as TRAIN's.
        metrics.add(self.kind, {"loss": self.average})
        brain.on_stage_end(self.brain_stage, self.average, self.epoch)
        self._gathered.close()
        brain.step = 0
        metrics.add(self.kind, {"loss": self.average})
        self.averages = [*self.averages, self.average]
        if name := self.set_names[self._position]:
            metrics.name_by_set(self.kind, name)

    def _average(self) -> float:
        return self.average

    def _batches(self, loader: Iterable[Any], position: int) -> Iterator[Any]:
        """``for batch in valid_set`` of ``_fit_valid`` and ``evaluate``.

        Lightning has no hook between two loaders, but fetches the first batch of the
        second when it is done with the first.
        """
        if self.by_recipe is not None:
            with torch.set_grad_enabled(self.run.grad_enabled), gathered(self.brain):
                self.by_recipe()
            return
        self._go_on_to(position)
        # Only now, after on_stage_start: a recipe may change shard_eval there.
        with self._bar(self._part(loader), position) as bar:
            for batch in bar:
                yield batch
                if self._is_debugged():
                    return

    def _part(self, loader: Iterable[Any]) -> Iterable[Any]:
        """The batches of a loader that are this rank's."""
        return loader


class ValidStage(EvaluationStage):
    """VALID: after the TRAIN stage of an epoch, or in its middle.

    Attributes:
        is_running: Whether it has started and not ended.
        first_position: Of the positions in the data, where a recipe validates on several sets.
    """

    kind = Stage.VALID
    first_position = 0
    is_running = False
    _statistics: sharding.ShardedStatistics | None = None
    _before = Phase.EPOCH_OVER
    # Several ranks may have different numbers of batches: they end before the first one.
    _may_be_terminated = False
    _parts_after = 0

    @property
    def is_sharded(self) -> bool:
        """Whether this rank has a part of the batches (``--shard_eval``)."""
        return self.brain._lightning.shard_eval and world_size() > 1

    def given(self) -> Any:
        """What ``fit`` was given to validate on, or None before it was looked at."""
        loaders = [loader.loader for loader in self.loaders]
        return loaders[0] if len(loaders) == 1 else loaders or None

    @with_error_context
    def start(self) -> None:
        """Starts the VALID stage, of the first loader where there are several."""
        self.is_running = True
        self._before = self.run_state.phase
        is_part = self.is_part and not self.is_within_training
        self._parts_after = self.run_state.parts_over + is_part
        if self.is_within_training:
            self.run_state.count_apart(self.run.train.step)
        else:
            self.run_state.begin_validation()
        super().start()

    @with_error_context
    def end(self) -> None:
        """Ends the VALID stage, of the last loader where there are several."""
        train, state = self.run.train, self.run_state
        with self._ending():
            super().end()
        self.is_running = False
        if train.is_running:
            # A Trainer may validate in the middle of an epoch.
            self.run.current = train
            if not self.is_part:
                self.brain.step = state.counts["step"]
                self.brain.modules.train()
            state.end_validation()

    @property
    def is_within_training(self) -> bool:
        """Whether a hook of a TRAIN stage calls ``_fit_valid``."""
        return self.is_part and self.run.train.is_running

    def _ending(self) -> AbstractContextManager[None]:
        parts = self._parts_after - self.run_state.parts_over
        return self.run_state.entering(self.phase_after, parts)

    @property
    def phase_after(self) -> Phase:
        """See ``RunStage.phase_after``."""
        if self.run.train.is_running:
            return self._before if self.is_part else Phase.VALIDATED
        # A recipe may validate before it trains.
        is_between = self._before is Phase.EPOCH_OVER
        return Phase.EPOCH_OVER if is_between else Phase.VALID_OVER

    def _start(self) -> None:
        super()._start()
        self._may_be_terminated = world_size() == 1 and not self.is_within_training
        self._statistics = None
        if self.is_sharded:
            sharding.synchronize_buffers(self.brain)
            self._statistics = sharding.ShardedStatistics(self.brain)

    def _after_batch(self) -> None:
        if self._statistics is not None:
            self._statistics.after_batch()
        if self._may_be_terminated:
            self.run.end_if_terminated()

    def _end(self) -> None:
        if self._statistics is not None:
            self.average = sharding.average_over_ranks(self.average, self.brain.step)
            self._statistics.merge()
        super()._end()

    def _part(self, loader: Iterable[Any]) -> Iterable[Any]:
        return sharding.Shard(loader) if self.is_sharded else loader

    def _iterate(self, loader: Iterable[Any], position: int) -> Iterator[Any]:
        if self.is_sharded:
            return iter(loader)
        position += self.first_position
        return self.run_state.validation_batches(loader, position)


class TestStage(EvaluationStage):
    """TEST: once, in ``evaluate``, with the best checkpoint."""

    kind = Stage.TEST
    # Not of an epoch.
    epoch = None

    @with_error_context
    def recover_best(self) -> None:
        """Begins an evaluation with ``on_evaluate_start``."""
        self.run.current = self
        with torch.set_grad_enabled(self.run.grad_enabled):
            self.brain.on_evaluate_start(**self.run.best_keys)
