"""The numbers of a run: each stage's loss, and what a recipe reports in its own words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch

from .borrowed import Borrowed
from .protocol import BrainProtocol
from .stage import Stage

# Arguments of SpeechBrain's TrainLogger.log_stats, with the stage each speaks of.
STAGES_OF_STATS = {
    "train_stats": Stage.TRAIN,
    "valid_stats": Stage.VALID,
    "test_stats": Stage.TEST,
}


class Metrics:
    """Gathers numbers for ``monitor=`` and the Trainer's loggers, without an edit.

    A recipe hands them to ``hparams.train_logger.log_stats`` and to the ``meta``
    of its checkpoints. They are named after their stage, ``valid_WER``, and
    without it, ``WER``; where several stages report a name, VALID has it.

    Args:
        stage: Gives the stage that is running, for a checkpoint does not say.
    """

    def __init__(self, stage: Callable[[], Stage]) -> None:
        self._stage = stage
        self._found: dict[Stage, dict[str, float]] = {each: {} for each in Stage}
        self._plain: dict[str, float] = {}

    def watch(self, brain: BrainProtocol, borrowed: Borrowed) -> None:
        """Listens to what the recipe reports, until everything borrowed is put back.

        Args:
            brain: The Brain whose train logger and checkpointer are listened to.
            borrowed: Takes note of what is changed.
        """
        train_logger = getattr(getattr(brain, "hparams", None), "train_logger", None)
        if hasattr(train_logger, "log_stats"):
            borrowed.shadow(train_logger, "log_stats", self._hearing_stats(train_logger))
        for name in ("save_checkpoint", "save_and_keep_only"):
            if hasattr(brain.checkpointer, name):
                hook = self._hearing_meta(getattr(brain.checkpointer, name))
                borrowed.shadow(brain.checkpointer, name, hook)

    def add(self, stage: Stage, numbers: Mapping[str, Any]) -> None:
        """Takes what is a number.

        Args:
            stage: The stage they speak of.
            numbers: Values by name; those that are no number are left out.
        """
        self._found[stage] |= _numbers_in(numbers)

    def tell_apart(self, stage: Stage, position: int) -> None:
        """Numbers what a stage found, where several loaders each are a stage.

        Args:
            stage: The stage that has ended.
            position: Of its loader among the others, from 0: ``valid_loss_0``.
        """
        prefix = stage.name.lower()
        found = self._found[stage]
        self._plain |= {f"{prefix}_{name}_{position}": v for name, v in found.items()}
        found.clear()

    def take(self) -> dict[str, float]:
        """What was found since the last call.

        Returns:
            Numbers by name, with and without their stage.
        """
        taken = dict(self._plain)
        # VALID comes last, for its names win.
        for stage in (Stage.TRAIN, Stage.TEST, Stage.VALID):
            found = self._found[stage]
            taken |= found
            taken |= {f"{stage.name.lower()}_{name}": value for name, value in found.items()}
            found.clear()
        self._plain.clear()
        return taken

    def _hearing_stats(self, train_logger: Any) -> Callable[..., Any]:
        log_stats = train_logger.log_stats

        def heard(
            stats_meta: Any,
            train_stats: Any = None,
            valid_stats: Any = None,
            test_stats: Any = None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            stats = (train_stats, valid_stats, test_stats)
            self._plain |= _numbers_in(stats_meta)
            for stage, numbers in zip(STAGES_OF_STATS.values(), stats, strict=True):
                self.add(stage, numbers or {})
            return log_stats(stats_meta, *stats, *args, **kwargs)

        return heard

    def _hearing_meta(self, save: Callable[..., Any]) -> Callable[..., Any]:
        def heard(*args: Any, **kwargs: Any) -> Any:
            # The first argument of both methods of a Checkpointer is meta.
            meta = kwargs.get("meta", args[0] if args else None)
            self.add(self._stage(), meta or {})
            return save(*args, **kwargs)

        return heard


def _numbers_in(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        str(name): float(value) for name, value in dict(values).items() if _is_number(value)
    }


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, Real) and not isinstance(value, bool)
