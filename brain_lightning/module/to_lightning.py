"""From a Brain subclass to its LightningModule class."""

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
        A class named after it, ``ASRModule`` for ``ASR``: automatic
        optimization unless ``fit_batch`` or ``optimizers_step`` is overridden.

    Raises:
        TypeError: ``brain_class`` is no Brain class.
    """
    hooks = [hook for hook in MANUAL_HOOKS if hasattr(brain_class, hook)]
    return _module_class(brain_class, any(overrides(brain_class, hook) for hook in hooks))


@cache
def _module_class(brain_class: type, manual: bool) -> type[BrainModule]:
    missing = [hook for hook in MANUAL_HOOKS if not hasattr(brain_class, hook)]
    if missing:
        raise TypeError(f"{brain_class!r} is no Brain class: it has no {missing[0]}")
    base: type[BrainModule] = ManualModule if manual else AutomaticModule

    def __init__(  # noqa: N807
        self: BrainModule,
        brain: Any,
        hparams: Any = None,  # noqa: ARG001
        **kwargs: Any,
    ) -> None:
        # Not those that load_from_checkpoint has read: the Brain has its own.
        base.__init__(self, brain, **kwargs)

    # What LightningCLI is to build a Brain of.
    __init__.__annotations__["brain"] = brain_class
    own = {"__module__": brain_class.__module__, "__doc__": base.__doc__, "__init__": __init__}
    return type(f"{brain_class.__name__}Module", (base,), own)


def to_lightning(brain: BrainProtocol, **kwargs: Any) -> BrainModule:
    """Turns a Brain into a LightningModule, for a Trainer that you make.

    Args:
        brain: The Brain; its modules are shared, not copied.
        **kwargs: ``epoch_counter``, by default ``hparams["epoch_counter"]``, else the
            epochs are 1, 2, … until the Trainer stops, and count on where it fits again;
            and others of ``BrainModule``.

    Returns:
        ``trainer.fit(to_lightning(brain), train_loader, valid_loader)`` gives the
        Brain the same weights as ``brain.fit`` with the same loaders.

    Raises:
        BrainTypeError: ``brain`` is a class.
    """
    if isinstance(brain, type):
        raise BrainTypeError(
            f"to_lightning needs a Brain, got the class {brain.__name__}: make one of it, or "
            f"use lightning_module_class({brain.__name__})"
        )
    return _module_class(type(brain), steps_itself(brain))(brain, **kwargs)
