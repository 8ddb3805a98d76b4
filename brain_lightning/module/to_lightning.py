"""Generates a LightningModule class from a Brain class."""

from __future__ import annotations

from functools import cache
from typing import Any

from brain_lightning.errors import BrainTypeError
from brain_lightning.protocol import MANUAL_HOOKS, BrainProtocol, overrides, steps_itself

from .automatic import AutomaticModule
from .brain_module import BrainModule
from .manual import ManualModule


def lightning_module_class(brain_class: type) -> type[BrainModule]:
    """Generates the LightningModule class for a Brain class.

    Args:
        brain_class: A subclass of ``Brain``.

    Returns:
        A class that is named after the Brain class, for example ``ASRModule`` for ``ASR``.
        It uses manual optimization if ``fit_batch`` or ``optimizers_step`` is overridden,
        and automatic optimization otherwise.

    Raises:
        TypeError: If ``brain_class`` is not a Brain class.
    """
    hooks = [hook for hook in MANUAL_HOOKS if hasattr(brain_class, hook)]
    return _module_class(brain_class, any(overrides(brain_class, hook) for hook in hooks))


@cache
def _module_class(brain_class: type, manual: bool) -> type[BrainModule]:
    missing = [hook for hook in MANUAL_HOOKS if not hasattr(brain_class, hook)]
    if missing:
        raise TypeError(f"{brain_class!r} is not a Brain class: it has no {missing[0]}")
    base: type[BrainModule] = ManualModule if manual else AutomaticModule

    def __init__(  # noqa: N807
        self: BrainModule,
        brain: Any,
        hparams: Any = None,  # noqa: ARG001
        **kwargs: Any,
    ) -> None:
        # hparams from load_from_checkpoint are ignored, because the Brain has hparams.
        base.__init__(self, brain, **kwargs)

    # LightningCLI reads this annotation to create the Brain.
    __init__.__annotations__["brain"] = brain_class
    own = {"__module__": brain_class.__module__, "__doc__": base.__doc__, "__init__": __init__}
    return type(f"{brain_class.__name__}Module", (base,), own)


def to_lightning(brain: BrainProtocol, **kwargs: Any) -> BrainModule:
    """Returns a LightningModule for a Brain, to use with your own Trainer.

    ``trainer.fit(to_lightning(brain), train_loader, valid_loader)`` trains the same weights
    as ``brain.fit`` with the same loaders.

    Args:
        brain: The Brain. Its modules are shared, not copied.
        **kwargs: ``epoch_counter`` and other arguments of ``BrainModule``. The default of
            ``epoch_counter`` is ``hparams["epoch_counter"]``. If there is none, the epochs
            are 1, 2, … until the Trainer stops. Another ``fit`` continues to count.

    Returns:
        The LightningModule.

    Raises:
        BrainTypeError: If ``brain`` is a class.
    """
    if isinstance(brain, type):
        raise BrainTypeError(
            f"to_lightning needs a Brain, but got the class {brain.__name__}. Create an "
            f"instance of it, or use lightning_module_class({brain.__name__})."
        )
    return _module_class(type(brain), steps_itself(brain))(brain, **kwargs)
