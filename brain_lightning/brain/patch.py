"""Makes ``fit`` and ``evaluate`` of SpeechBrain's own Brain run on a Trainer."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback

from brain_lightning.errors import UnsupportedError
from brain_lightning.protocol import PARTS, TrainerDefaults
from brain_lightning.step.older_api import add_older_api
from brain_lightning.temporary import TemporaryAttributes

from .fit import FitAndEvaluate
from .own_fit import is_on_trainer, on_trainer


class Patch(TemporaryAttributes):
    """The changes of ``patch_speechbrain``; as a context manager, it undoes them on exit."""

    def patch_subclass(self, cls: Any) -> None:
        """Makes an overridden ``fit`` run on one Trainer.

        Args:
            cls: A subclass of SpeechBrain's Brain, defined before or after the patch.
        """
        if not is_on_trainer(cls.fit, FitAndEvaluate.fit):
            self.override(cls, "fit", on_trainer(cls.fit))

    def undo(self) -> None:
        """Restores SpeechBrain's own loops; a second call has no effect."""
        self.restore()


def patch_speechbrain(
    trainer: Mapping[str, Any] | None = None, callbacks: Sequence[Callback] = ()
) -> Patch:
    """Makes ``fit`` and ``evaluate`` of every SpeechBrain Brain run on a Trainer.

    Args:
        trainer: Arguments for every Trainer; they take precedence over ``hparams["trainer"]``.
        callbacks: Callbacks to add to every Trainer.

    Returns:
        The patch, which is already in effect. ``with patch_speechbrain(): ...`` undoes
        it on exit.

    Raises:
        UnsupportedError: SpeechBrain is not installed.
    """
    try:
        core = importlib.import_module("speechbrain.core")
        # The patch changes this module, too.
        importlib.import_module("speechbrain.utils.parameter_transfer")
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "patch_speechbrain() needs SpeechBrain, which is not installed. Run pip install "
            "speechbrain, or let the recipe subclass brain_lightning.Brain."
        ) from error
    patch = Patch()
    # The change to the class itself affects all of its subclasses.
    for name in ("fit", "evaluate", *PARTS):
        patch.override(core.Brain, name, getattr(FitAndEvaluate, name))
    defaults = TrainerDefaults(dict(trainer or {}), tuple(callbacks))
    patch.override(core.Brain, "_lightning_defaults", defaults)
    add_older_api(core.Brain, patch)

    def __init_subclass__(cls: Any, /, **kwargs: Any) -> None:  # noqa: N807
        super(core.Brain, cls).__init_subclass__(**kwargs)
        patch.patch_subclass(cls)

    patch.override(core.Brain, "__init_subclass__", classmethod(__init_subclass__))
    for brain_class in _subclasses(core.Brain):
        patch.patch_subclass(brain_class)
    return patch


def _subclasses(cls: Any) -> Iterator[Any]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
