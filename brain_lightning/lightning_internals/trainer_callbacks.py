"""The callbacks of a Trainer: their hooks, when they save, and who exchanges the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

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


def save_as_automatic(trainer: Trainer, temporary: TemporaryAttributes) -> None:
    """Lets ModelCheckpoint save after a batch, whoever makes the steps.

    Since Lightning 2.6 it looks at ``every_n_train_steps`` alone with manual optimization, and
    warns of weights that it would save after a step
    (https://github.com/Lightning-AI/pytorch-lightning/issues/21699).

    Args:
        trainer: The Trainer of a Brain that overrides ``fit_batch``.
        temporary: Records what is changed on its callbacks.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, ModelCheckpoint):
            temporary.wrap(callback, "on_train_batch_end", _told_by_automatic)


def _told_by_automatic(
    hook: Any, trainer: Trainer, module: LightningModule, *args: Any, **kwargs: Any
) -> None:
    hook(trainer, _Automatic(module), *args, **kwargs)


class _Automatic:
    """A module, as ModelCheckpoint sees one with automatic optimization."""

    automatic_optimization = True

    def __init__(self, module: LightningModule) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


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
