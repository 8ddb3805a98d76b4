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
    """VALID or TEST. If there are several loaders, each loader has its own stage.

    Attributes:
        averages: Average losses of the stages that are over, one per loader.
        is_part: Whether the recipe runs the stage by ``_fit_valid``, not the Trainer.
    """

    averages: Sequence[float] = ()
    is_part = False
    _position = 0
    _waits_for_losses = True

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        # Gathers sharded modules from after on_stage_start until after on_stage_end.
        self._gathered = ExitStack()
        self._running_average = RunningAverage(self.brain)

    @property
    def average(self) -> float:
        """Average loss of the stage that is running or ran last."""
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
        """Starts the stage of the first loader."""
        self._position, self.averages = 0, ()
        for loader in self.loaders:
            loader.start()
        self._start()

    @with_error_context
    def end(self) -> None:
        """Ends the stage of the last loader."""
        self._advance_to(len(self.loaders) - 1)
        self._end()
        self.brain._lightning.set_name = ""

    def _advance_to(self, position: int) -> None:
        """Ends the stage of the current loader, and starts the stages up to ``position``.

        Lightning skips a loader if a limit leaves no batch of it for this process. The stage
        of such a loader is started and ended here.
        """
        while self._position < position:
            self._end()
            self._position += 1
            self._start()

    @with_error_context
    def evaluate(self, batch: Any) -> Any:
        """Counts a batch, evaluates it and averages its loss.

        Args:
            batch: Batch as the DataLoader returned it.

        Returns:
            The detached loss. The default ``evaluate_batch`` leaves it on the Brain's device.
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
            # SpeechBrain's evaluate continues from the step of a checkpoint within an epoch.
            self.brain.step = 0
        with torch.set_grad_enabled(self.run.grad_enabled):
            self.brain.on_stage_start(self.brain_stage, self.epoch)
        self._waits_for_losses = self._must_wait()
        self.brain.modules.eval()
        self.gather()

    def _must_wait(self) -> bool:
        """Whether each loss is used immediately, or is already on the CPU."""
        overridden = any(has_own(self.brain, h) for h in ("evaluate_batch", "update_average"))
        return overridden or device_type(self.brain.device) == "cpu"

    def gather(self) -> None:
        """Gathers sharded weights until the stage, or the run, is over."""
        self._gathered.enter_context(gathered(self.brain))

    def _end(self) -> None:
        brain, metrics = self.brain, self.run.metrics
        # A limit of the Trainer leaves the pass unfinished, with its workers and its bar.
        self.loaders[self._position].close()
        if self.by_recipe is not None:
            return
        # SpeechBrain's order: fit() resets the step before the hook, evaluate() after it.
        if self.kind is Stage.VALID:
            brain.step = 0
        # Added twice, as in TrainStage.end.
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
        """Yields batches like ``for batch in valid_set`` of ``_fit_valid`` and ``evaluate``.

        Lightning calls no hook between two loaders. It fetches the first batch of the second
        loader after the last batch of the first.
        """
        if self.by_recipe is not None:
            with torch.set_grad_enabled(self.run.grad_enabled), gathered(self.brain):
                self.by_recipe()
            return
        self._advance_to(position)
        # After on_stage_start, because a recipe may change shard_eval in this hook.
        with self._bar(self._part(loader), position) as bar:
            for batch in bar:
                yield batch
                if self._is_debugged():
                    return

    def _part(self, loader: Iterable[Any]) -> Iterable[Any]:
        """Returns the batches of a loader that this rank evaluates."""
        return loader


class ValidStage(EvaluationStage):
    """VALID: runs after the TRAIN stage of an epoch, or in the middle of it.

    Attributes:
        is_running: Whether the stage has started and not ended.
        first_position: Index of the first position in the validation data that the stage
            uses. It is not 0 if a recipe validates on several datasets.
    """

    kind = Stage.VALID
    first_position = 0
    is_running = False
    _statistics: sharding.ShardedStatistics | None = None
    _before = Phase.EPOCH_OVER
    # False for several ranks: they may have different numbers of batches, and end between
    # stages.
    _may_be_terminated = False
    _parts_after = 0

    @property
    def is_sharded(self) -> bool:
        """Whether each rank evaluates a part of the batches (``--shard_eval``)."""
        return self.brain._lightning.shard_eval and world_size() > 1

    def given(self) -> Any:
        """Returns the validation data that ``fit`` got, or None before it was wrapped."""
        loaders = [loader.loader for loader in self.loaders]
        return loaders[0] if len(loaders) == 1 else loaders or None

    @with_error_context
    def start(self) -> None:
        """Starts the VALID stage of the first loader."""
        self.is_running = True
        self._before = self.run_state.phase
        is_part = self.is_part and not self.is_within_training
        self._parts_after = self.run_state.parts_over + is_part
        if self.is_within_training:
            self.run_state.keep_train_counts(self.run.train.step)
        else:
            self.run_state.begin_validation()
        super().start()

    @with_error_context
    def end(self) -> None:
        """Ends the VALID stage of the last loader."""
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
    """TEST: runs once in ``evaluate``, with the best checkpoint."""

    kind = Stage.TEST
    # TEST does not belong to an epoch.
    epoch = None

    @with_error_context
    def recover_best(self) -> None:
        """Calls ``on_evaluate_start``, which recovers the best checkpoint."""
        self.run.current = self
        with torch.set_grad_enabled(self.run.grad_enabled):
            self.brain.on_evaluate_start(**self.run.best_keys)
