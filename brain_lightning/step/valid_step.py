"""``valid_step`` of SpeechBrain 0.5, which its ``fit_batch`` uses to decide when to step."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from brain_lightning.protocol import BrainProtocol


class ValidStep:
    """``valid_step``: number of training batches of an epoch with a finite loss.

    A ``fit_batch`` written for SpeechBrain 0.5 increments it. If a recipe assigns the
    attribute before reading it, the recipe uses the name for something else. The attribute is
    then neither incremented nor reset.
    """

    def __get__(self, brain: Any, owner: type | None = None) -> Any:
        if brain is None:
            return self
        if "_lightning" in vars(brain):
            brain._lightning.valid_step_was_read = True
        return vars(brain).get("valid_step", 0)

    def __set__(self, brain: Any, value: Any) -> None:
        own = vars(brain)
        if "_lightning" in own and not brain._lightning.valid_step_was_read:
            brain._lightning.counts_valid_steps = False
        own["valid_step"] = value


def count_valid_step(brain: BrainProtocol) -> None:
    """Counts a batch that the default ``fit_batch`` fitted.

    Args:
        brain: Brain in training.
    """
    if _counts(brain):
        own = vars(brain)
        own["valid_step"] = own.get("valid_step", 0) + 1


def reset_valid_step(brain: BrainProtocol) -> None:
    """Resets the count to 0 at the end of the TRAIN stage.

    Args:
        brain: Brain in training.
    """
    if _counts(brain):
        vars(brain)["valid_step"] = 0


def _counts(brain: BrainProtocol) -> bool:
    return brain._lightning.counts_valid_steps and _is_ours(type(brain))


# Cached, because it is called for each batch.
@cache
def _is_ours(brain_class: type) -> bool:
    member = inspect.getattr_static(brain_class, "valid_step", None)
    return isinstance(member, ValidStep)
