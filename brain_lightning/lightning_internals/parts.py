"""Runs single stages on a Trainer: ``_fit_train`` and ``_fit_valid`` of a Brain (parts).

A recipe may override these methods, or call them in an overridden ``fit``, as in
SpeechBrain's tutorial of the Brain class. One epoch of Lightning starts with ``_fit_train``
and ends before the next one, so that callbacks see each validation within an epoch.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.optim.optimizer import register_optimizer_step_post_hook

from brain_lightning.resume.saved_state import EpochState
from brain_lightning.stage import Stage
from brain_lightning.stages.metrics import arguments_of
from brain_lightning.stages.run import Run
from brain_lightning.temporary import TemporaryAttributes

from .counters import count_steps
from .loaders import StageSource
from .loops import AFTER_TRAINING, BrainEpochLoop, BrainFitLoop, fit_loop_of

logger = logging.getLogger(__name__)


# A custom loop that requests so many parts of one kind after the end is an endless loop.
MAX_SKIPPED_PARTS = 1000


class _TrainerHasEnded(BaseException):
    """Ends a custom ``fit``."""


class StageParts:
    """Runs single stages of a run (``stages.run.Parts``).

    Args:
        trainer: The Trainer.
        run: The run.
        by_parts: Whether the whole run consists of parts. If not, only a hook may validate.
        own_fit: The overridden ``fit`` of the recipe. None if this class runs the epochs of
            SpeechBrain's ``fit``.
        resume: Function that resumes the run, after ``own_fit`` has recovered a checkpoint.
    """

    def __init__(
        self,
        trainer: Trainer,
        run: Run,
        by_parts: bool,
        own_fit: Callable[[], Any] | None,
        resume: Callable[[], None],
    ) -> None:
        self._trainer, self._run, self.by_parts = trainer, run, by_parts
        self._own_fit, self._resume = own_fit, resume
        # The Trainer's validation set.
        self._given: Any = None
        self._has_begun = self._epoch_is_open = self._is_running = False
        # Whether the Trainer has ended the training.
        self._has_ended = False
        # Whether the Trainer, not the recipe, started the current validation.
        self._by_trainer = False
        # How many parts were skipped after the end.
        self._skipped: Counter[Stage] = Counter()
        # Number of the Brain's optimizer steps that the Trainer has counted.
        self._counted = 0
        # The resumed epoch, until a part starts that was not complete before the save.
        self._resumed: EpochState | None = None
        self._epoch: Any = None
        # Index of the current part in the epoch.
        self._index = 0

    @property
    def _loop(self) -> BrainFitLoop:
        return fit_loop_of(self._trainer)

    @property
    def may_train(self) -> bool:
        """See ``Parts``."""
        return self.by_parts and not self._is_running

    @property
    def may_valid(self) -> bool:
        """See ``Parts``."""
        return not self._run.valid.is_running

    def run(self) -> None:
        """Runs the whole ``fit``."""
        with suppress(_TrainerHasEnded):
            self._fit() if self._own_fit is None else self._fit_by_recipe(self._own_fit)
        self._end_epoch()
        if self._has_begun:
            self._loop.on_run_end()

    def _fit_by_recipe(self, own_fit: Callable[[], Any]) -> None:
        with TemporaryAttributes() as temporary:
            temporary.wrap(self._run.brain, "on_stage_end", self._on_stage_end)
            own_fit()

    def _on_stage_end(self, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs an ``on_stage_end`` as a part, if the recipe calls it outside of parts."""
        brain = self._run.brain
        stage, _, epoch, *_ = (*arguments_of(hook, args, kwargs).values(), None)
        if self._is_running or stage is brain._lightning.stage_type.TEST:
            return hook(*args, **kwargs)
        is_train = stage is brain._lightning.stage_type.TRAIN
        run = self.train_by_recipe if is_train else self.valid_by_recipe
        return run(lambda: brain.on_stage_end(*args, **kwargs), epoch)

    def _fit(self) -> None:
        """Runs the epochs of ``speechbrain.Brain.fit``, if the recipe overrides a part."""
        run, loop = self._run, self._loop
        epoch_loop = loop.epoch_loop
        assert isinstance(epoch_loop, BrainEpochLoop)
        loop.setup_data()
        if loop.skip:
            return
        self._begin()
        while not loop.done:
            epoch, bar = run.epochs.current, run.trainer.shows_bar
            run.brain._fit_train(train_set=run.train.loader.loader, epoch=epoch, enable=bar)
            if epoch_loop.validation_is_due():
                self.validate_by_brain(bar)
            self._end_epoch()

    def validate_by_brain(self, bar: bool) -> None:
        """Validates with the Brain's ``_fit_valid``, on the Trainer's validation set.

        Args:
            bar: Whether to show a progress bar.
        """
        with TemporaryAttributes() as temporary:
            temporary.set(self, "_by_trainer", self._run.train.is_running)
            if self._trainer.enable_validation:
                # The loader may not exist yet.
                with self._validating():
                    self._loop.epoch_loop.val_loop.setup_data()
            self._given = self._run.valid.given()
            epoch = self._run.epochs.current
            self._run.brain._fit_valid(valid_set=self._given, epoch=epoch, enable=bar)

    def _begin(self) -> None:
        if self._has_begun:
            return
        self._has_begun = True
        loop, state = self._loop, self._run.run_state
        if self._own_fit is not None:
            self._run.epochs.is_collective = self._trainer.world_size > 1
            self._resume()
            if state.resumed is not None and state.resumed["end_of_epoch"]:
                # The recipe starts with the next epoch.
                state.resumed["epoch"] = None
        self._resumed = state.resumed_epoch
        self._counted = self._run.brain.optimizer_step
        loop.setup_data()
        # Restore the grad mode that Lightning enables: a recipe may fit in an evaluation.
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            loop.reset()
            loop.on_run_start()

    def is_over(self) -> bool:
        """See ``Parts``."""
        if self._is_running:
            return False
        self._end_epoch()
        return self._trains_nothing or self._loop.is_over

    @property
    def _trains_nothing(self) -> bool:
        """Whether Lightning skips the whole fit, including its hooks."""
        return bool(self._trainer.limit_train_batches == 0)

    def _end_epoch(self) -> None:
        if self._epoch_is_open:
            self._epoch_is_open = False
            self._loop.on_advance_end()

    # ------------------------------------------------------------------- TRAIN

    def train(self, train_set: Any, epoch: Any, enable: bool) -> None:
        """See ``Parts``."""
        loop, stage = self._loop, self._run.train
        if not any(each.loader is train_set for each in stage.loaders):
            self._source(loop).part, loop._combined_loader = train_set, None
        with self._part(Stage.TRAIN, epoch, enable) as runs:
            if runs:
                self._run_epoch(epoch, loop.advance)

    def train_by_recipe(self, recipe: Callable[[], Any], epoch: Any) -> None:
        """Runs one TRAIN stage with a custom loop.

        Args:
            recipe: The overridden ``_fit_train``.
            epoch: The number of the epoch.
        """
        with self._part(Stage.TRAIN, epoch) as runs:
            if runs and self._run.run_state.resumed_phase in AFTER_TRAINING:
                self._run_epoch(epoch, self._loop.advance)
            elif runs:
                with self._run.train.written_by_recipe(recipe):
                    self._run_epoch(epoch, self._train_by_recipe)

    def _train_by_recipe(self) -> None:
        brain, seen = self._run.brain, []
        counts = register_optimizer_step_post_hook(lambda *_: seen.append(1))
        with counts, TemporaryAttributes() as temporary:
            temporary.set(brain, "optimizer_step_limit", self._optimizer_step_limit())
            self._run.train.run_by_recipe()
        # A recipe that steps its optimizers may not increment optimizer_step.
        steps = brain.optimizer_step - self._counted or len(seen)
        count_steps(self._trainer, steps)
        self._loop.epoch_loop._batches_that_stepped += steps
        self._run.train.windows += steps

    def _optimizer_step_limit(self) -> int | None:
        """Combines ``optimizer_step_limit`` and ``max_steps``; custom loops read the limit."""
        brain, trainer = self._run.brain, self._trainer
        limits = [brain.optimizer_step_limit]
        if trainer.max_steps >= 0:
            limits.append(brain.optimizer_step + trainer.max_steps - trainer.global_step)
        return min((limit for limit in limits if limit is not None), default=None)

    def _run_epoch(self, epoch: Any, advance: Callable[[], None]) -> None:
        loop, run = self._loop, self._run
        run.epochs.resume(epoch)
        loop.on_advance_start()
        advance()
        if run.train.is_running:
            # There was no batch.
            run.train.end()
        self._epoch_is_open = True
        self._counted = run.brain.optimizer_step

    # ------------------------------------------------------------------- VALID

    def valid(self, valid_set: Any, epoch: Any, enable: bool) -> None:
        """See ``Parts``."""
        if valid_set is None:
            return
        with self._part(Stage.VALID, epoch, enable) as runs:
            if runs:
                self._validate(valid_set, epoch)

    def valid_by_recipe(self, recipe: Callable[[], Any], epoch: Any) -> None:
        """Runs one VALID stage with a custom loop.

        Args:
            recipe: The overridden ``_fit_valid``.
            epoch: The number of the epoch.
        """
        with self._part(Stage.VALID, epoch) as runs:
            if runs:
                with self._run.valid.written_by_recipe(recipe):
                    # The custom loop runs as the only batch of this set.
                    self._validate((None,), epoch)

    def _validate(self, valid_set: Any, epoch: Any) -> None:
        trainer, run = self._trainer, self._run
        connector, epoch_loop = trainer._logger_connector, self._loop.epoch_loop
        first, within = connector._first_loop_iter, run.train.is_running
        # As in Lightning, the validation is logged at the step of the last batch.
        back = int(not within and epoch_loop._batches_that_stepped > 0)
        epoch_loop._batches_that_stepped -= back
        with TemporaryAttributes() as temporary:
            temporary.set(run.epochs, "current", epoch)
            temporary.set(run, "grad_enabled", torch.is_grad_enabled())
            temporary.override(run.valid, "is_part", not self._by_trainer)
            temporary.override(run.valid, "first_position", self._position())
            self._take(valid_set, temporary)
            temporary.enter_context(self._validating())
            # val_loop.run may be replaced by a call of the Brain's _fit_valid.
            type(epoch_loop.val_loop).run(epoch_loop.val_loop)
        connector._first_loop_iter = first
        epoch_loop._batches_that_stepped += back

    @contextmanager
    def _validating(self) -> Iterator[None]:
        self._trainer.validating = True
        try:
            yield
        finally:
            self._trainer.training = True

    def _position(self) -> int:
        """Returns the index of the validation set in the epoch."""
        state = self._run.run_state
        return max(0, state.parts_over - state.train_part - 1)

    def _take(self, valid_set: Any, temporary: TemporaryAttributes) -> None:
        """Makes Lightning's loop validate on a set until ``temporary`` is restored."""
        loop, stage = self._loop.epoch_loop.val_loop, self._run.valid
        loaders = [each.loader for each in stage.loaders]
        if valid_set is self._given or (len(loaders) == 1 and loaders[0] is valid_set):
            return
        temporary.set(stage, "loaders", stage.loaders)
        temporary.set(loop, "_combined_loader", None)
        temporary.set(self._source(loop), "part", valid_set)

    # -------------------------------------------------------------------- both

    def _source(self, loop: Any) -> StageSource:
        source = loop._data_source
        assert isinstance(source, StageSource)
        return source

    @contextmanager
    def _part(self, kind: Stage, epoch: Any, enable: bool = False) -> Iterator[bool]:
        """The context of one part; yields whether to run it."""
        within = self._is_running or not self.by_parts
        if not within and not self._may_run(kind, epoch):
            yield False
            return
        with TemporaryAttributes() as temporary:
            bar = enable and self._trainer.progress_bar_callback is None
            temporary.set(self._run.trainer, "shows_bar", bar)
            temporary.set(self, "_is_running", True)
            yield True
        if not within:
            self._index += 1
            self._count_parts()

    def _may_run(self, kind: Stage, epoch: Any) -> bool:
        self._has_ended |= self._trains_nothing
        if not self._has_ended:
            self._begin()
        if not self._has_ended and kind is Stage.TRAIN:
            self._end_epoch()
            self._has_ended = self._loop.is_over
        if self._has_ended:
            self._skip(kind, epoch)
        return not self._has_ended and not self._was_over(kind, epoch)

    def _skip(self, kind: Stage, epoch: Any) -> None:
        self._skipped[kind] += 1
        if self._skipped[kind] == 1:
            name = "_fit_train" if kind is Stage.TRAIN else "_fit_valid"
            logger.warning(
                "The Trainer has ended the training. %s of epoch %s and later calls are "
                "skipped.",
                name,
                epoch,
            )
        if self._skipped[kind] == MAX_SKIPPED_PARTS:
            logger.warning(
                "The custom loop of %s.fit continues after the training has ended, so it is "
                "interrupted. Iterate over the epoch_counter that is passed to fit.",
                type(self._run.brain).__name__,
            )
            raise _TrainerHasEnded

    def _was_over(self, kind: Stage, epoch: Any) -> bool:
        """Whether a part was complete before the run was resumed."""
        state = self._run.run_state
        if epoch != self._epoch:
            self._epoch, self._index = epoch, 0
        resumed = self._resumed_here
        if resumed is not None:
            over = resumed["train_part" if kind is Stage.TRAIN else "parts_over"]
            if self._index < over:
                self._index += 1
                return True
        elif kind is Stage.TRAIN:
            self._resumed = None
            if state.resumed is not None:
                # The recipe starts with another epoch.
                state.resumed["epoch"] = None
        if kind is Stage.TRAIN:
            state.train_part = self._index
        elif resumed is not None:
            self._resumed = None
        self._count_parts()
        return False

    @property
    def _resumed_here(self) -> EpochState | None:
        """The resumed epoch, if the recipe runs a part of the same epoch."""
        resumed = self._resumed
        is_asked_for = resumed is not None and resumed["number"] in (self._epoch, None)
        return resumed if is_asked_for else None

    def _count_parts(self) -> None:
        # Parts after the resumed TRAIN stage may be complete as well.
        resumed = self._resumed_here
        over = 0 if resumed is None else resumed["parts_over"]
        self._run.run_state.parts_over = max(self._index, over)
