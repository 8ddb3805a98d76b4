"""SpeechBrain's own Brain, its ``fit`` and ``evaluate`` run on a Trainer."""

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
    """What ``patch_speechbrain`` changed; leaving it as a context undoes that."""

    def patch_subclass(self, cls: Any) -> None:
        """Runs a ``fit`` that a recipe has written itself on one Trainer.

        Args:
            cls: A subclass of SpeechBrain's Brain, when it is made or before.
        """
        if not is_on_trainer(cls.fit, FitAndEvaluate.fit):
            self.override(cls, "fit", on_trainer(cls.fit))

    def undo(self) -> None:
        """Gives SpeechBrain its own loops back; a second call does nothing."""
        self.restore()


def patch_speechbrain(
    trainer: Mapping[str, Any] | None = None, callbacks: Sequence[Callback] = ()
) -> Patch:
    """Makes ``fit`` and ``evaluate`` of every SpeechBrain Brain run on a Trainer.

    Args:
        trainer: Arguments for every Trainer; they outrank ``hparams["trainer"]``.
        callbacks: Callbacks for every Trainer, in addition to its own.

    Returns:
        The patch, which is effective already. ``with patch_speechbrain(): ...`` undoes
        it at the end.

    Raises:
        UnsupportedError: SpeechBrain is not installed.
    """
    try:
        core = importlib.import_module("speechbrain.core")
        # What the patch changes, too.
        importlib.import_module("speechbrain.utils.parameter_transfer")
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "patch_speechbrain() needs SpeechBrain: pip install speechbrain, or give your "
            "recipe our Brain, from brain_lightning import Brain"
        ) from error
    patch = Patch()
    # On the class itself, and with it on all of its subclasses.
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
