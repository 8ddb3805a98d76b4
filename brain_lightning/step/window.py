"""A window of batches that weigh by what they have, as one batch of all of them would.

By default each batch of a window counts the same: the gradient is the mean over batches. With
``accumulate_by="tokens"`` it is the mean over targets, or frames: ``loss_weight(batch)`` of
the Brain says how many of them ``compute_objectives`` took its mean over. A loss is multiplied
by that before its backward pass; when the window is full, the gradients are divided by what
the weights in all processes add up to.

What the weights add up to is known at the end alone. Until then losses are divided by a
reference, near to the weight of the window before, so that gradients have their usual size,
which a scaler for fp16 expects. It is a power of two, which changes no bit of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.optim import Optimizer

from brain_lightning.compat.speechbrain import calls_ours
from brain_lightning.distributed.communication import communicates, world_size
from brain_lightning.errors import BrainTypeError, UnsupportedError
from brain_lightning.fsdp2.tensors import local
from brain_lightning.optimizers.active import all_optimizers, trained_parameters
from brain_lightning.protocol import MANUAL_HOOKS, BrainProtocol, has_own, parameters_of

OPTION = "accumulate_by='tokens'"


class WindowState(TypedDict):
    """A window, as it is saved.

    Attributes:
        weight: See ``Window``.
        reference: See ``Window``.
    """

    weight: float | None
    reference: float


@dataclass(frozen=True)
class Window:
    """The weights of the batches whose gradients have been accumulated.

    It is replaced and never changed, so that an earlier one may be restored. Its numbers stay
    on the device, and no step waits for them.

    Attributes:
        weight: Of the batches of this process; None where there is none yet.
        reference: What their losses were divided by, the same in all processes.
    """

    weight: Tensor | float | None = None
    # Of the first window nothing is known in all processes: at worst fp16 skips its step.
    reference: Tensor | float = 1.0

    def state(self) -> WindowState:
        """What to save of it."""
        weight = None if self.weight is None else float(self.weight)
        return {"weight": weight, "reference": float(self.reference)}


def check_window(brain: BrainProtocol) -> None:
    """Refuses a Brain whose batches cannot be weighed.

    Args:
        brain: The Brain that is going to train.

    Raises:
        UnsupportedError: It has no ``loss_weight``, or a step of its own.
    """
    if brain._lightning.accumulate_by == "batches":
        return
    name = type(brain).__name__
    if not callable(getattr(brain, "loss_weight", None)):
        raise UnsupportedError(
            f"{OPTION} needs a method loss_weight(self, batch) of {name}, which returns the "
            "number of targets, or frames, that compute_objectives takes its mean over: "
            "define it, or use accumulate_by='batches'"
        )
    for hook in MANUAL_HOOKS:
        if has_own(brain, hook) and not calls_ours(brain, hook):
            raise UnsupportedError(
                f"{OPTION} has no effect in {name}.{hook}: call super().{hook} there, which "
                "has to be that of our Brain (from brain_lightning import Brain), or use "
                "accumulate_by='batches'"
            )


def is_full(brain: BrainProtocol) -> bool:
    """Whether the window ends with the batch in hand.

    Args:
        brain: The Brain in training; its ``step`` counts this batch already.
    """
    ends_early = brain._lightning.ends_window
    return brain.step % brain.grad_accumulation_factor == 0 or ends_early


def window_of(brain: BrainProtocol) -> Window:
    """The window that is not full.

    Args:
        brain: The Brain in training.
    """
    return brain._lightning.window or Window()


def restart_window(brain: BrainProtocol) -> None:
    """Begins a new window, where the gradients of the last one are dropped.

    Args:
        brain: The Brain in training.
    """
    brain._lightning.window = Window(reference=window_of(brain).reference)


def restore_window(brain: BrainProtocol, saved: WindowState) -> None:
    """Restores a window.

    Args:
        brain: The Brain in training.
        saved: From ``Window.state``.
    """
    brain._lightning.window = Window(**saved)


def weight_of(brain: BrainProtocol, batch: Any, loss: Tensor) -> Tensor | None:
    """What a batch weighs in its window.

    Args:
        brain: The Brain in training.
        batch: What the loader gave.
        loss: What ``compute_objectives`` has just returned.

    Returns:
        One number beside the loss; None where all batches weigh the same.

    Raises:
        BrainTypeError: ``loss_weight`` returned no number of 0 or more.
    """
    if brain._lightning.accumulate_by == "batches":
        return None
    found: Any = brain.loss_weight(batch)  # type: ignore[attr-defined]
    # In full precision also where the loss is not.
    dtype = torch.promote_types(loss.dtype, torch.float32)
    number = found
    if isinstance(found, Tensor) and found.numel() == 1:
        if not found.is_cpu:
            return found.detach().reshape(()).to(loss.device, dtype)
        number = found.item()
    if isinstance(number, Real) and 0 <= number <= torch.finfo(dtype).max:  # type: ignore[operator]
        # Unlike torch.tensor it does not wait for the device.
        return torch.full((), float(number), dtype=dtype, device=loss.device)
    raise BrainTypeError(
        f"{type(brain).__name__}.loss_weight must return the number of targets of a batch, 0 "
        f"or more, or a tensor with that number, got {found!r:.80}"
    )


def share_of_window(brain: BrainProtocol, loss: Tensor, weight: Tensor | None) -> Tensor:
    """What a batch adds to the loss of its window, from which the backward pass begins.

    Args:
        brain: The Brain in training.
        loss: What ``compute_objectives`` returned.
        weight: From ``weight_of``.
    """
    if weight is None:
        factor = brain.grad_accumulation_factor
        return loss if factor == 1 else loss / factor
    # In the precision of the weight: in fp16 the product may be too large for the loss's own.
    return loss.to(weight.dtype) * (weight / window_of(brain).reference)


def add_to_window(brain: BrainProtocol, weight: Tensor | None) -> None:
    """Counts a batch whose gradients are in the window: its loss was finite everywhere.

    Args:
        brain: The Brain in training.
        weight: From ``weight_of``.
    """
    if weight is not None:
        window = window_of(brain)
        before = 0.0 if window.weight is None else window.weight
        brain._lightning.window = Window(before + weight, window.reference)


def end_window(brain: BrainProtocol, active: Iterable[Optimizer]) -> None:
    """Makes the gradients of a full window the mean over all of its targets.

    All processes call it, once gradients are averaged over them, and before they are unscaled
    and clipped. An optimizer that is frozen keeps its gradients until it steps: they are
    divided then, by what the weights of the last window add up to.

    Args:
        brain: The Brain in training.
        active: The optimizers that are about to step.
    """
    window = window_of(brain)
    if window.weight is None:
        return
    weight = _mean_over_processes(brain, window.weight)
    # Batches without a target have no gradients.
    weight = torch.where(weight > 0, weight, window.reference)
    # The next power of two.
    reference = weight / torch.frexp(weight).mantissa
    frozen = _parameters(all_optimizers(brain).values()) - _parameters(active)
    others = {*trained_parameters(brain)} - frozen
    _multiply_gradients(others, window.reference / weight)
    _multiply_gradients(frozen, window.reference / reference)
    brain._lightning.window = Window(reference=reference)


@torch.no_grad()
def _multiply_gradients(parameters: Iterable[Tensor], factor: Tensor) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = local(parameter.grad)
            gradient.mul_(factor.to(gradient.device))


def _parameters(optimizers: Iterable[Optimizer]) -> set[Tensor]:
    return {p for optimizer in optimizers for p in parameters_of(optimizer)}


def _mean_over_processes(brain: BrainProtocol, weight: Tensor | float) -> Tensor:
    """The mean of the weights, for that of their gradients has been taken."""
    if not isinstance(weight, Tensor):
        # It was restored, or gradients were dropped, and no batch came after.
        weight = torch.full((), weight, device=brain.device)
    if not communicates():
        return weight
    # One process may have another type than the others.
    weight = weight.to(torch.float64, copy=True)
    torch.distributed.all_reduce(weight)
    return weight / world_size()
