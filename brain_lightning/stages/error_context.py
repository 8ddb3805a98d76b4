"""Where an error comes from: its stage, its epoch, its step and its batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import suppress
from reprlib import Repr
from typing import Any, Protocol, TypeVar

from brain_lightning.compat.versions import add_note
from brain_lightning.errors import HookStoppedError
from brain_lightning.stage import Stage

Method = TypeVar("Method", bound=Callable[..., Any])

PREFIX = "brain_lightning: in "
# No errors but ways to end a loop.
CONTROL_FLOW = (StopIteration, HookStoppedError)

_short = Repr()
_short.maxlist = _short.maxtuple = 8
_short.maxstring = _short.maxother = 80


class Located(Protocol):
    """Something that knows where it is."""

    def locate(self, error: Exception, batch: Any = None) -> None:
        """Adds the place to an error."""


def calls_hooks(method: Method) -> Method:
    """Names the place of an error of a Brain's hook, and lets no hook end Lightning's loop.

    Args:
        method: A method of something that is ``Located``; what it takes first, if anything,
            is the batch in hand.

    Returns:
        The method, in which a StopIteration is a ``HookStoppedError``.
    """

    @functools.wraps(method)
    def guarded(self: Located, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except StopIteration as error:
            raise HookStoppedError("a hook of the Brain raised StopIteration") from error
        except Exception as error:
            self.locate(error, *args[:1])
            raise

    return guarded  # type: ignore[return-value]


def add_place(
    error: Exception, stage: Stage, epoch: Any, step: Mapping[str, int], batch: Any
) -> None:
    """Adds to an error where it comes from; from a fit within a fit, the inner one first.

    Args:
        error: The error; its type and its arguments stay as they are.
        stage: The stage that runs.
        epoch: Its epoch, or None.
        step: The number of the step, by what it is called; 0 where none was taken.
        batch: The batch in hand; ``batch.id``, as SpeechBrain's PaddedBatch has it, or
            ``batch["id"]`` is shown, cut short.
    """
    if isinstance(error, CONTROL_FLOW):
        return
    place = [] if epoch is None else [f"epoch {epoch}"]
    place += [f"{name} {number}" for name, number in step.items() if number]
    # An error may be of a class that takes no notes.
    with suppress(Exception):
        add_note(error, PREFIX + ", ".join([stage.name, *place]) + _ids_of(batch))


def _ids_of(batch: Any) -> str:
    # Whatever goes wrong here must not take the place of the error.
    with suppress(Exception):
        ids = batch.get("id") if isinstance(batch, Mapping) else getattr(batch, "id", None)
        if ids is not None:
            ids = ids.tolist() if hasattr(ids, "tolist") else ids
            return f", with batch.id {_short.repr(ids)}"
    return ""
