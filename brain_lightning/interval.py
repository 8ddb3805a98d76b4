"""Checkpoints in the middle of an epoch."""

from __future__ import annotations

import logging
import time
from typing import Any

from .distributed import ddp_broadcast
from .protocol import BrainProtocol

# In a checkpoint's meta; SpeechBrain finds the ones to replace by it.
INTRA_EPOCH_CKPT_FLAG = "brain_intra_epoch_ckpt"


class IntervalCheckpoints:
    """Saves every so many minutes or steps of one training stage.

    Whether and how is asked of the Brain, whose recipe may override either.

    Args:
        brain: The Brain in training.
    """

    def __init__(self, brain: BrainProtocol) -> None:
        self._brain = brain
        self._restart()

    def after_step(self) -> None:
        """Saves if the interval is over; called once per batch."""
        self._steps += 1
        if self._brain._should_save_intra_epoch_ckpt(self._since, self._steps):
            self._brain._save_intra_epoch_ckpt()
            self._restart()

    def _restart(self) -> None:
        self._since = time.time()
        self._steps = 0


def is_due(minutes: float, steps: int, last_ckpt_time: float, steps_since_ckpt: int) -> bool:
    """Whether it is time to save (``speechbrain.Brain._should_save_intra_epoch_ckpt``).

    Args:
        minutes: The interval in minutes, or 0.
        steps: The interval in steps, or 0.
        last_ckpt_time: When the last one was saved, in seconds.
        steps_since_ckpt: Batches since then.

    Returns:
        The same in every process: their clocks differ, and saving is done together.
    """
    if minutes <= 0 and steps <= 0:
        return False
    elapsed = (time.time() - last_ckpt_time) / 60
    due = 0 < minutes < elapsed or 0 < steps <= steps_since_ckpt
    return bool(ddp_broadcast(due))


def save(checkpointer: Any) -> None:
    """Saves, and keeps one such checkpoint (``speechbrain.Brain._save_intra_epoch_ckpt``).

    Args:
        checkpointer: What the Brain saves with.
    """
    checkpointer.save_and_keep_only(
        end_of_epoch=False,
        num_to_keep=1,
        ckpt_predicate=_is_intra_epoch,
        meta={INTRA_EPOCH_CKPT_FLAG: True},
        verbosity=logging.DEBUG,
    )


def _is_intra_epoch(checkpoint: Any) -> bool:
    return INTRA_EPOCH_CKPT_FLAG in checkpoint.meta
