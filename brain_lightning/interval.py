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
    """Saves every so many minutes or steps of one training stage, keeping one.

    (``speechbrain.Brain._should_save_intra_epoch_ckpt`` and
    ``_save_intra_epoch_ckpt``.)

    Args:
        brain: Gives the checkpointer and the interval; without a checkpointer
            nothing is saved.
    """

    def __init__(self, brain: BrainProtocol) -> None:
        self._brain = brain
        self._restart()

    def after_step(self) -> None:
        """Saves if the interval is over; called once per batch."""
        self._steps += 1
        brain = self._brain
        on = brain.ckpt_interval_minutes > 0 or brain.ckpt_interval_steps > 0
        # The clocks of two processes differ; saving is done together.
        if brain.checkpointer is not None and on and ddp_broadcast(self._is_due()):
            self._save()
            self._restart()

    def _restart(self) -> None:
        self._since = time.monotonic()
        self._steps = 0

    def _is_due(self) -> bool:
        minutes = (time.monotonic() - self._since) / 60
        return (
            0 < self._brain.ckpt_interval_minutes < minutes
            or 0 < self._brain.ckpt_interval_steps <= self._steps
        )

    def _save(self) -> None:
        self._brain.checkpointer.save_and_keep_only(
            end_of_epoch=False,
            num_to_keep=1,
            ckpt_predicate=_is_intra_epoch,
            meta={INTRA_EPOCH_CKPT_FLAG: True},
            verbosity=logging.DEBUG,
        )


def _is_intra_epoch(checkpoint: Any) -> bool:
    return INTRA_EPOCH_CKPT_FLAG in checkpoint.meta
