"""The callbacks of a Trainer: which hooks they have, and whether they exchange the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint

from brain_lightning.temporary import TemporaryAttributes


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


def overwrite_files(trainer: Trainer, temporary: TemporaryAttributes) -> None:
    """Lets ModelCheckpoint write a file again, and not one that is numbered beside it.

    Args:
        trainer: The Trainer of a run that was resumed at the end of an epoch, which may have
            saved its files before it was killed.
        temporary: Records what is changed.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, ModelCheckpoint):
            temporary.set(callback, "_enable_version_counter", False)


def leave_groups_as_recovered(callback: Callback) -> None:
    """Keeps BaseFinetuning from assigning, when the next run starts, the groups of its state.

    They are recovered with the optimizers, by name.

    Args:
        callback: A callback that has loaded its state after ``on_fit_start``.
    """
    if isinstance(callback, BaseFinetuning):
        callback._restarting = False


class AverageInUse:
    """The averages that callbacks have put in place of the weights.

    ``WeightAveraging`` of Lightning 2.6 exchanges both while it validates. What is saved then
    has to hold the weights.
    """

    def __init__(self) -> None:
        self._in_use: dict[int, Any] = {}

    def watch(self, callbacks: Sequence[Callback], temporary: TemporaryAttributes) -> None:
        """Records each exchange, until ``temporary`` is restored.

        Args:
            callbacks: Those of the Trainer.
            temporary: Records what is changed on them.
        """
        for callback in callbacks:
            swap = getattr(callback, "_swap_models", None)
            if swap is not None:
                recorded = partial(self._swap, callback, swap)
                temporary.override(callback, "_swap_models", recorded)

    def _swap(self, callback: Any, swap: Any, module: LightningModule) -> None:
        swap(module)
        if self._in_use.pop(id(callback), None) is None:
            self._in_use[id(callback)] = swap

    @contextmanager
    def put_back(self, module: LightningModule) -> Iterator[None]:
        """Exchanges them for the weights, for what is saved within.

        Args:
            module: The module that trains.

        Yields:
            None
        """
        swaps = list(self._in_use.values())
        for swap in swaps:
            swap(module)
        yield
        for swap in reversed(swaps):
            swap(module)

    def correct(self, checkpoint: dict[str, Any]) -> None:
        """Exchanges them in a file that ``WeightAveraging`` has written both to.

        Args:
            checkpoint: The content of the file.
        """
        if self._in_use and "current_model_state" in checkpoint:
            weights, average = checkpoint["state_dict"], checkpoint["current_model_state"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = average, weights
