"""What a Brain subclass may override to say what is computed, and to act at each event."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from brain_lightning.stage import Stage

from .base import BrainBase


class BrainHooks(BrainBase):
    """The hooks of ``speechbrain.core.Brain`` that compute nothing by themselves."""

    # --------------------------------------------------------- what to compute

    def compute_forward(self, batch: Any, stage: Stage) -> Any:
        """Computes predictions; must be overridden.

        Args:
            batch: What the loader gave.
            stage: TRAIN, VALID or TEST.

        Returns:
            Whatever ``compute_objectives`` needs.
        """
        raise NotImplementedError

    def compute_objectives(self, predictions: Any, batch: Any, stage: Stage) -> Tensor:
        """Computes the loss; must be overridden.

        Args:
            predictions: What ``compute_forward`` returned.
            batch: What the loader gave.
            stage: TRAIN, VALID or TEST.

        Returns:
            A tensor with one number, to minimize.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------- hooks

    def on_stage_start(self, stage: Stage, epoch: Any = None) -> None:
        """Called when a stage starts, before the modules change between train and eval.

        Args:
            stage: The stage.
            epoch: Its epoch; None in TEST.
        """

    def on_stage_end(self, stage: Stage, stage_loss: float, epoch: Any = None) -> None:
        """Called when a stage has ended: the place for statistics and checkpoints.

        Args:
            stage: The stage.
            stage_loss: The average loss over its batches.
            epoch: Its epoch; None in TEST.
        """

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        """Called before the forward pass of a training batch, outside autocast.

        Args:
            batch: What the loader gave.
            should_step: Whether an update will follow.
        """

    def on_fit_batch_end(
        self, batch: Any, outputs: Any, loss: Tensor, should_step: bool
    ) -> None:
        """Called after the update.

        Args:
            batch: What the loader gave.
            outputs: What ``compute_forward`` returned.
            loss: What ``compute_objectives`` returned.
            should_step: Whether there was an update; False where one was due
                but skipped, for its only loss was not finite.
        """

    def on_evaluate_start(
        self, max_key: str | None = None, min_key: str | None = None
    ) -> None:
        """Begins ``evaluate``: loads the best checkpoint.

        Args:
            max_key: The metric of which more is better.
            min_key: The metric of which less is better.
        """
        if self.checkpointer is not None:
            self.checkpointer.recover_if_possible(max_key=max_key, min_key=min_key)
