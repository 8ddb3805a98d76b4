"""Adds the stage, epoch, step and batch to an error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from brain_lightning.batch_content import ids_of
from brain_lightning.compat.versions import add_note
from brain_lightning.errors import HookStoppedError
from brain_lightning.fsdp2.unsupported import explanation
from brain_lightning.stage import Stage
from brain_lightning.step.out_of_memory import is_out_of_memory, note_batch, note_memory

Method = TypeVar("Method", bound=Callable[..., Any])


def with_error_context(method: Method) -> Method:
    """Decorates a method of a stage: errors get a note with their stage, epoch and step.

    Args:
        method: Method of a stage of a run. If it has an argument, the first is the batch.

    Returns:
        The decorated method. It raises ``HookStoppedError`` instead of ``StopIteration``,
        because a ``StopIteration`` would end Lightning's loop silently.
    """

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except StopIteration as error:
            raise HookStoppedError("a hook of the Brain raised StopIteration") from error
        except Exception as error:
            self.run.locate(error, *args[:1])
            raise

    return guarded  # type: ignore[return-value]


def add_context(
    error: Exception, stage: Stage, epoch: Any, step: str, batch: Any, device: str
) -> None:
    """Adds a note to an error. In nested fits, the note of the inner fit comes first.

    Args:
        error: The error. Its type and its arguments do not change.
        stage: Stage that is running.
        epoch: Epoch of the stage, or None.
        step: Name and number of the step, or an empty string.
        batch: Current batch. The note shows a shortened ``batch.id``, which SpeechBrain's
            PaddedBatch has, or ``batch["id"]``. For an out-of-memory error it also shows
            the shapes and lengths in the batch.
        device: Device of the Brain. Its memory is shown for an out-of-memory error.
    """
    # These exceptions end a loop and are not errors.
    if isinstance(error, (StopIteration, HookStoppedError)):
        return
    context = (stage.name, "" if epoch is None else f"epoch {epoch}", step)
    # The class of the error may not accept notes.
    with suppress(Exception):
        where = ", ".join(filter(None, context))
        ids = ids_of(batch)
        add_note(error, f"brain_lightning: in {where}{ids and f', with batch.id {ids}'}")
        if meaning := explanation(error):
            add_note(error, meaning)
        if is_out_of_memory(error):
            note_batch(error, batch)
            note_memory(error, device)
