"""The callbacks of a Trainer, and which hooks they have."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The callbacks of a Trainer, an attribute that Lightning's type hints do not show.

    Args:
        trainer: Any Trainer.
    """
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def has_hook(callback: Callback, hook: str) -> bool:
    """Whether a callback overrides a hook, in its class or on the instance.

    Args:
        callback: The callback.
        hook: A method of ``Callback``.
    """
    method = getattr(callback, hook)
    return getattr(method, "__func__", None) is not getattr(Callback, hook)
