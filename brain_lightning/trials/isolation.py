"""What a trial must not reach: what the recipe saves and logs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from brain_lightning.protocol import BrainProtocol, hparams_of
from brain_lightning.temporary import TemporaryAttributes

# Of a Checkpointer, SpeechBrain's or ours.
SAVES = ("save_checkpoint", "save_and_keep_only", "delete_checkpoints")
# Of a train logger (speechbrain.utils.train_logger).
LOGS = ("log_stats", "log_image", "log_audio", "log_figure")


def isolate(brain: BrainProtocol, temporary: TemporaryAttributes) -> None:
    """Puts the Checkpointer and the train loggers of a recipe out of reach.

    Hooks may call them: they do nothing.

    Args:
        brain: The Brain.
        temporary: Records what is changed.
    """
    for owner in _writers(brain):
        for name in (*SAVES, *LOGS):
            if callable(getattr(owner, name, None)):
                temporary.override(owner, name, _nothing)


def _writers(brain: BrainProtocol) -> Iterator[Any]:
    if brain.checkpointer is not None:
        yield brain.checkpointer
    found = {id(obj): obj for obj in (*hparams_of(brain).values(), *vars(brain).values())}
    yield from (obj for obj in found.values() if hasattr(obj, "log_stats"))


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for a method that would write."""
