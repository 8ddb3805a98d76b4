"""Checkpoints in the middle of an epoch."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from brain_lightning.distributed.communication import ddp_broadcast, if_main_process
from brain_lightning.protocol import BrainProtocol, has_own, is_explicit

if TYPE_CHECKING:
    from .run import Run

# Key in a checkpoint's meta. SpeechBrain finds the checkpoints to replace by this key.
INTRA_EPOCH_CKPT_FLAG = "brain_intra_epoch_ckpt"


class IntervalCheckpoints:
    """Saves a checkpoint every few minutes or steps of one TRAIN stage.

    The Brain decides whether and how to save, because a recipe may override both methods.

    Args:
        run: The run that trains.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._restart()

    def is_time(self) -> bool:
        """Whether the interval is over by the clock of rank 0; False on the other ranks."""
        return is_over(self._run.brain, self._since) and if_main_process()

    def after_step(self, is_time: bool) -> None:
        """Saves if the interval is over. Called once per batch.

        Args:
            is_time: Result of ``is_time`` on rank 0.
        """
        self._steps += 1
        if self._is_due(is_time):
            self._run.save_within_epoch()
            self._restart()

    def _is_due(self, is_time: bool) -> bool:
        brain, method = self._run.brain, "_should_save_intra_epoch_ckpt"
        if brain.checkpointer is None:
            if not self._run.trainer.saves or not is_asked_for(brain):
                return False
        elif has_own(brain, method):
            return brain._should_save_intra_epoch_ckpt(self._since, self._steps)
        return is_time or 0 < brain.ckpt_interval_steps <= self._steps

    def _restart(self) -> None:
        self._since = time.time()
        self._steps = 0


def is_asked_for(brain: BrainProtocol) -> bool:
    """Whether the user set an interval explicitly.

    Without a Checkpointer, checkpoints within an epoch are saved only in this case.

    Args:
        brain: The Brain.
    """
    options = ("ckpt_interval_minutes", "ckpt_interval_steps")
    return any(is_explicit(brain, option) and getattr(brain, option) > 0 for option in options)


def is_over(brain: BrainProtocol, last_ckpt_time: float) -> bool:
    """Whether ``ckpt_interval_minutes`` have passed by the clock of this process.

    Args:
        brain: The Brain that trains.
        last_ckpt_time: Time of the last checkpoint, in seconds.
    """
    return 0 < brain.ckpt_interval_minutes < (time.time() - last_ckpt_time) / 60


def is_due(brain: BrainProtocol, last_ckpt_time: float, steps_since_ckpt: int) -> bool:
    """Whether it is time to save (``speechbrain.Brain._should_save_intra_epoch_ckpt``).

    Args:
        brain: Brain with the ``ckpt_interval_minutes`` and ``ckpt_interval_steps``.
        last_ckpt_time: Time of the last checkpoint, in seconds.
        steps_since_ckpt: Number of batches since the last checkpoint.

    Returns:
        The answer of rank 0, on every rank: clocks differ, and a save is collective.
    """
    minutes, steps = brain.ckpt_interval_minutes, brain.ckpt_interval_steps
    if minutes <= 0 and steps <= 0:
        return False
    due = is_over(brain, last_ckpt_time) or 0 < steps <= steps_since_ckpt
    return bool(ddp_broadcast(due))


def save(checkpointer: Any) -> None:
    """Saves, and keeps one checkpoint of this kind.

    Corresponds to ``speechbrain.Brain._save_intra_epoch_ckpt``.

    Args:
        checkpointer: Checkpointer of the Brain.
    """
    checkpointer.save_and_keep_only(
        end_of_epoch=False,
        num_to_keep=1,
        ckpt_predicate=lambda checkpoint: INTRA_EPOCH_CKPT_FLAG in checkpoint.meta,
        meta={INTRA_EPOCH_CKPT_FLAG: True},
        verbosity=logging.DEBUG,
    )
