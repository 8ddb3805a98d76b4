"""SpeechBrain's order of events, cut at the places where Lightning calls.

Read together, the methods are ``speechbrain.Brain._fit_train``, ``_fit_valid``
and ``evaluate``; which Lightning hook calls which is said in ``callback.py``
and ``module.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from .epochs import Epochs
from .interval import IntervalCheckpoints
from .progress import progress_bar
from .protocol import BrainProtocol
from .stage import Stage
from .stage_loader import StageLoader

logger = logging.getLogger(__name__)


class Stages:
    """The stages of one run of a Brain: one ``fit`` or one ``evaluate``.

    Args:
        brain: The Brain that runs.
        epochs: Its epochs.
        progressbar: Whether to show SpeechBrain's bar.
        max_key: For ``on_evaluate_start``.
        min_key: For ``on_evaluate_start``.

    Attributes:
        average: The average loss of the evaluation stage that runs or ran last.
        in_training: Whether a TRAIN stage has started and not ended.
    """

    def __init__(
        self,
        brain: BrainProtocol,
        epochs: Epochs,
        *,
        progressbar: bool = False,
        max_key: str | None = None,
        min_key: str | None = None,
    ) -> None:
        self.brain = brain
        self.epochs = epochs
        self.progressbar = progressbar
        self.average = 0.0
        self.in_training = False
        self._keys = {"max_key": max_key, "min_key": min_key}
        self._loaders: dict[Stage, list[StageLoader]] = {stage: [] for stage in Stage}
        # Lightning disables gradients before it says that a stage starts.
        self._grad_enabled = torch.is_grad_enabled()

    def wrap(self, loader: Iterable[Any], stage: Stage) -> StageLoader:
        """Puts a stage's loader under the control of the stage.

        Args:
            loader: What the Trainer was given for the stage.
            stage: The stage.

        Returns:
            What the Trainer is to iterate.
        """
        batches = (
            self._train_batches
            if stage is Stage.TRAIN
            else partial(self._evaluation_batches, stage=stage)
        )
        wrapped = StageLoader(loader, batches)
        self._loaders[stage].append(wrapped)
        return wrapped

    @property
    def train_loader(self) -> StageLoader:
        """The loader of the TRAIN stage."""
        return self._loaders[Stage.TRAIN][-1]

    def close(self) -> None:
        """Ends every pass: no worker process and no open bar is left behind."""
        for loaders in self._loaders.values():
            for loader in loaders:
                loader.close()

    # ------------------------------------------------------------------ TRAIN

    def start_train(self) -> None:
        """Begins the TRAIN stage of the next epoch."""
        brain, epoch = self.brain, self.epochs.start()
        self.in_training = True
        brain.on_stage_start(Stage.TRAIN, epoch)
        brain.modules.train()
        brain.zero_grad()
        brain.nonfinite_count = 0
        if hasattr(brain.train_sampler, "set_epoch"):
            brain.train_sampler.set_epoch(epoch)
        self._start_loaders(Stage.TRAIN)

    def fit(self, fit_batch: Callable[[Any], Any], batch: Any) -> Any:
        """Counts a training batch, fits it and averages its loss.

        Args:
            fit_batch: Does the work.
            batch: What the loader gave.

        Returns:
            The detached loss.
        """
        brain = self.brain
        brain.step += 1
        loss = fit_batch(batch)
        brain.avg_train_loss = brain.update_average(loss, brain.avg_train_loss)
        return loss

    def end_train(self) -> None:
        """Ends the TRAIN stage."""
        brain = self.brain
        self.train_loader.close()
        brain.zero_grad(set_to_none=True)
        brain.on_stage_end(Stage.TRAIN, brain.avg_train_loss, self.epochs.current)
        brain.avg_train_loss = 0.0
        brain.step = 0
        self.in_training = False

    def end_epoch(self) -> None:
        """Decides, after validation, whether another epoch may follow."""
        brain = self.brain
        if (
            brain.debug and self.epochs.current == brain.debug_epochs
        ) or self._limit_reached():
            self.epochs.stop()

    def _train_batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """``for batch in train_set`` of ``_fit_train``; the Trainer fits where it yields."""
        brain = self.brain
        checkpoints = IntervalCheckpoints(brain)
        with progress_bar(brain, loader, Stage.TRAIN, self.progressbar) as bar:
            for batch in bar:
                if self._limit_reached():
                    logger.info("Train iteration limit exceeded")
                    return
                yield batch
                # Shown with the next batch: a refresh per step costs a third of a loop.
                bar.set_postfix(train_loss=brain.avg_train_loss, refresh=False)
                if brain.debug and brain.step == brain.debug_batches:
                    return
                checkpoints.after_step()

    def _limit_reached(self) -> bool:
        limit = self.brain.optimizer_step_limit
        return limit is not None and self.brain.optimizer_step >= limit

    # --------------------------------------------------------- VALID and TEST

    def start_valid(self) -> None:
        """Begins the VALID stage."""
        self._start_evaluation(Stage.VALID, self.epochs.current)

    def end_valid(self) -> None:
        """Ends the VALID stage."""
        self.brain.step = 0
        self.brain.on_stage_end(Stage.VALID, self.average, self.epochs.current)

    def start_test(self) -> None:
        """Begins an evaluation: the best checkpoint, then the TEST stage."""
        with torch.set_grad_enabled(self._grad_enabled):
            self.brain.on_evaluate_start(**self._keys)
        self._start_evaluation(Stage.TEST, None)

    def end_test(self) -> None:
        """Ends the TEST stage."""
        self.brain.on_stage_end(Stage.TEST, self.average, None)
        self.brain.step = 0

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
        loss = brain.evaluate_batch(batch, stage=stage)
        self.average = brain.update_average(loss, self.average)
        return loss

    def _start_evaluation(self, stage: Stage, epoch: Any) -> None:
        with torch.set_grad_enabled(self._grad_enabled):
            self.brain.on_stage_start(stage, epoch)
        self.brain.modules.eval()
        self.average = 0.0
        self._start_loaders(stage)

    def _evaluation_batches(self, loader: Iterable[Any], stage: Stage) -> Iterator[Any]:
        """``for batch in valid_set`` of ``_fit_valid`` and ``evaluate``."""
        brain = self.brain
        with progress_bar(brain, loader, stage, self.progressbar) as bar:
            for batch in bar:
                yield batch
                if brain.debug and brain.step == brain.debug_batches:
                    return

    def _start_loaders(self, stage: Stage) -> None:
        for loader in self._loaders[stage]:
            loader.start()
