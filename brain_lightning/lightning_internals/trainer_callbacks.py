"""The callbacks of a Trainer: which hooks they have, and whether they exchange the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from lightning.pytorch.callbacks.spike import SpikeDetection
from torch import Tensor, nn

from brain_lightning.step.pruning import ORIGINAL
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


def state_of(callback: Callback) -> dict[str, Any]:
    """What a callback needs to resume.

    Args:
        callback: The callback.

    Returns:
        Its ``state_dict``. ModelPruning has none: the weights that its lottery ticket resets
        to, or None for one that it has reset: from then on it shares the trained weight.
    """
    if not isinstance(callback, ModelPruning):
        return callback.state_dict()
    tickets = {
        str(index): None if first.data_ptr() == trained.data_ptr() else first.detach().cpu()
        for index, first, trained in _tickets(callback)
    }
    return {"tickets": tickets} if tickets else {}


def load_state(callback: Callback, state: dict[str, Any]) -> None:
    """Restores it.

    Args:
        callback: The callback.
        state: From ``state_of``.
    """
    if not isinstance(callback, ModelPruning):
        callback.load_state_dict(state)
        return
    for index, first, trained in _tickets(callback):
        saved = state["tickets"][str(index)]
        first.data = trained.data if saved is None else saved.to(first.device)


def _tickets(callback: ModelPruning) -> Iterator[tuple[int, nn.Parameter, Tensor]]:
    """What a weight is reset to, and the weight."""
    for layer in (callback._original_layers or {}).values():
        for index, name in layer["names"]:
            module, _ = callback._parameters_to_prune[index]
            trained = getattr(module, name + ORIGINAL, None)
            yield (
                index,
                getattr(layer["data"], name),
                getattr(module, name) if trained is None else trained,
            )


def repair(callback: Callback, temporary: TemporaryAttributes) -> None:
    """Lets SpikeDetection resume, which of Lightning 2.6.6 cannot.

    Its ``load_state_dict`` looks for ``running``, and the window of losses, which is
    ``running_mean``, is not in its state.

    Args:
        callback: Any callback.
        temporary: Records what is changed.
    """
    if not isinstance(callback, SpikeDetection):
        return
    window = callback.running_mean
    window.persistent(True)
    temporary.override(callback, "running", window)

    def state_dict(original: Any) -> dict[str, Any]:
        return {**original(), "seen": window._num_vals_seen}

    def load_state_dict(original: Any, state: dict[str, Any]) -> None:
        window._num_vals_seen = state.pop("seen", 0)
        original(state)

    temporary.wrap(callback, "state_dict", state_dict)
    temporary.wrap(callback, "load_state_dict", load_state_dict)


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
