"""Disables the Checkpointers and train loggers of a recipe during a trial."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from inspect import getattr_static
from typing import Any

from brain_lightning.protocol import BrainProtocol, hparams_of
from brain_lightning.temporary import TemporaryAttributes

# Methods of brain_lightning's and SpeechBrain's Checkpointer.
SAVES = ("save_checkpoint", "save_and_keep_only", "delete_checkpoints")
# Methods of a train logger (speechbrain.utils.train_logger).
LOGS = ("log_stats", "log_image", "log_audio", "log_figure")


def isolate(
    brain: BrainProtocol, objects: Iterable[Any], temporary: TemporaryAttributes
) -> None:
    """Disables the Checkpointers and the train loggers of a recipe.

    Hooks may still call their methods, which then do nothing.

    Args:
        brain: The Brain.
        objects: All objects that are reachable from the Brain.
        temporary: Records the changes.
    """
    for owner in _writers(brain, objects):
        for name in (*SAVES, *LOGS):
            if callable(getattr(owner, name, None)):
                temporary.override(owner, name, _nothing)


def _writers(brain: BrainProtocol, objects: Iterable[Any]) -> Iterator[Any]:
    if brain.checkpointer is not None:
        yield brain.checkpointer
    # getattr_static, because an object with __getattr__ is not necessarily a train logger.
    own = (*hparams_of(brain).values(), *vars(brain).values())
    yield from (obj for obj in own if getattr_static(obj, "log_stats", None) is not None)
    for obj in objects:
        cls: Any = type(obj)
        if _is_writer(cls):
            yield obj


@cache
def _is_writer(cls: Any) -> bool:
    return hasattr(cls, "log_stats") or hasattr(cls, "save_and_keep_only")


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Replaces a method that writes."""
