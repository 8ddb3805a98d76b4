"""SpeechBrain's own Brain, its ``fit`` and ``evaluate`` run on a Trainer."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from lightning.pytorch import Callback

from brain_lightning.errors import UnsupportedError
from brain_lightning.temporary import TemporaryAttributes

from . import fit as brain_loops


class Patch:
    """What ``patch_speechbrain`` changed; leaving it as a context undoes that."""

    def __init__(self) -> None:
        self._temporary = TemporaryAttributes()

    def apply(
        self, brain_class: Any, trainer: Mapping[str, Any], callbacks: Sequence[Callback]
    ) -> None:
        """Changes SpeechBrain's Brain, and with it all of its subclasses.

        Args:
            brain_class: ``speechbrain.core.Brain``.
            trainer: Arguments for every Trainer.
            callbacks: Callbacks for every Trainer.
        """
        self._temporary.override(brain_class, "fit", brain_loops.fit)
        self._temporary.override(brain_class, "evaluate", brain_loops.evaluate)
        self._temporary.override(brain_class, "trainer_overrides", dict(trainer))
        self._temporary.override(brain_class, "trainer_callbacks", tuple(callbacks))

    def undo(self) -> None:
        """Gives SpeechBrain its own loops back; a second call does nothing."""
        self._temporary.restore()

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()


def patch_speechbrain(
    trainer: Mapping[str, Any] | None = None, callbacks: Sequence[Callback] = ()
) -> Patch:
    """Makes ``fit`` and ``evaluate`` of every SpeechBrain Brain run on a Trainer.

    Args:
        trainer: Arguments for every Trainer; they outrank ``hparams["trainer"]``.
        callbacks: Callbacks for every Trainer, beside those that it has.

    Returns:
        The patch, in force already. ``with patch_speechbrain(): ...`` undoes it at
        the end.

    Raises:
        UnsupportedError: SpeechBrain is not installed.
    """
    try:
        core = importlib.import_module("speechbrain.core")
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "patch_speechbrain() needs SpeechBrain: pip install speechbrain, or give your "
            "recipe our Brain, from brain_lightning import Brain"
        ) from error
    patch = Patch()
    patch.apply(core.Brain, trainer or {}, callbacks)
    return patch
