"""Where an error comes from: its stage, epoch, step and batch."""

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
    """Adds to an error in a hook of the Brain where it comes from.

    Args:
        method: A method of a stage of a run, whose first argument, if any, is the batch.

    Returns:
        The method; a StopIteration in it is a ``HookStoppedError``, for it would end
        Lightning's loop.
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
    """Adds a note to an error; in a fit within a fit, that of the inner one comes first.

    Args:
        error: The error; its type and its arguments stay as they are.
        stage: The stage that is running.
        epoch: Its epoch, or None.
        step: The number of the step and what it is called, or nothing.
        batch: The batch in hand; ``batch.id``, as SpeechBrain's PaddedBatch has it, or
            ``batch["id"]`` is shown, cut short. Where there was no memory for it, so are the
            shapes and lengths in it.
        device: The device of the Brain, whose memory is shown then.
    """
    # Not errors, but ways to end a loop.
    if isinstance(error, (StopIteration, HookStoppedError)):
        return
    context = (stage.name, "" if epoch is None else f"epoch {epoch}", step)
    # An error may be of a class that takes no notes.
    with suppress(Exception):
        where = ", ".join(filter(None, context))
        ids = ids_of(batch)
        add_note(error, f"brain_lightning: in {where}{ids and f', with batch.id {ids}'}")
        if meaning := explanation(error):
            add_note(error, meaning)
        if is_out_of_memory(error):
            note_batch(error, batch)
            note_memory(error, device)
