"""The numbers of a run: each stage's loss, and what a recipe reports in its own words."""

from __future__ import annotations

import inspect
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
# Lightning names files and axes by these, and counts them itself.
LIGHTNINGS_OWN = {"epoch", "step"}


class Metrics:
    """Gathers numbers for ``monitor=`` and the Trainer's loggers, without an edit.

    A recipe hands them to ``hparams.train_logger.log_stats`` and to the ``meta``
    of its checkpoints. They are named after their stage, ``valid_WER``, and
    without it, ``WER``; where several stages report a name, VALID has it.

    Args:
        stage: Gives the stage that is running, for a checkpoint does not say.

    Attributes:
        validated: Whether the run has a VALID stage.
    """

    def __init__(self, stage: Callable[[], Stage]) -> None:
        self.validated = False
        self._stage = stage
        self._found: dict[Stage, dict[str, float]] = {each: {} for each in Stage}
        self._plain: dict[str, float] = {}
        # Names that are VALID's from its first report on.
        self._valids: set[str] = set()

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

    def add(self, stage: Stage, numbers: Any) -> None:
        """Takes what is a number.

        Args:
            stage: The stage they speak of.
            numbers: Values by name; those that are no number are left out, and so
                is anything but a mapping, for a recipe may report what it likes.
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
        self._valids |= self._found[Stage.VALID].keys() | (
            {"loss"} if self.validated else set()
        )
        taken = {n: v for n, v in self._plain.items() if n not in LIGHTNINGS_OWN}
        for stage, found in self._found.items():
            taken |= {f"{stage.name.lower()}_{name}": value for name, value in found.items()}
            mine = found.keys() - LIGHTNINGS_OWN
            mine -= set() if stage is Stage.VALID else self._valids
            taken |= {name: found[name] for name in mine}
            found.clear()
        self._plain.clear()
        return taken

    def _hearing_stats(self, train_logger: Any) -> Callable[..., Any]:
        log_stats = train_logger.log_stats
        signature = inspect.signature(log_stats)

        def heard(*args: Any, **kwargs: Any) -> Any:
            # Its result, and its errors, are the recipe's own.
            result = log_stats(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            self._plain |= _numbers_in(given.get("stats_meta"))
            for name, stage in STAGES_OF_STATS.items():
                self.add(stage, given.get(name))
            return result

        return heard

    def _hearing_meta(self, save: Callable[..., Any]) -> Callable[..., Any]:
        def heard(*args: Any, **kwargs: Any) -> Any:
            # The first argument of both methods of a Checkpointer is meta.
            meta = kwargs.get("meta", args[0] if args else None)
            self.add(self._stage(), meta)
            return save(*args, **kwargs)

        return heard


def _numbers_in(values: Any) -> dict[str, float]:
    if not isinstance(values, Mapping):
        return {}
    return {str(name): float(value) for name, value in values.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, Real) and not isinstance(value, bool)
