"""The accumulation window: batches for one optimizer step, and how they are weighted.

By default each batch of a window has the same weight: the gradient is the mean over batches.
With ``accumulate_by="tokens"`` it is the mean over targets (tokens or frames), as for one
large batch. The Brain's ``loss_weight(batch)`` returns the number of targets that
``compute_objectives`` takes its mean over. Each loss is multiplied by this number before its
backward pass. When the window is full, the gradients are divided by the sum of the weights
over all ranks.

The sum of the weights is known only at the end. Until then, losses are divided by a reference
that is close to the sum of the previous window. Gradients then have their usual magnitude,
which the gradient scaler of fp16 needs. The reference is a power of two, so the division is
exact.
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
    """State of a window in a checkpoint.

    Attributes:
        weight: See ``Window``.
        reference: See ``Window``.
    """

    weight: float | None
    reference: float


@dataclass(frozen=True)
class Window:
    """Sum of the weights of the batches whose gradients have been accumulated.

    The object is immutable, so that an earlier window can be restored. Its numbers stay on
    the device, so that no step waits for them.

    Attributes:
        weight: Sum over the batches of this rank, or None before the first batch.
        reference: Divisor of their losses, the same on all ranks.
    """

    weight: Tensor | float | None = None
    # The first window has no estimate that is equal on all ranks. At worst fp16 skips a step.
    reference: Tensor | float = 1.0

    def state(self) -> WindowState:
        """Returns the state to save."""
        weight = None if self.weight is None else float(self.weight)
        return {"weight": weight, "reference": float(self.reference)}


def check_window(brain: BrainProtocol) -> None:
    """Raises an error if the Brain cannot weigh its batches.

    Args:
        brain: Brain that is going to train.

    Raises:
        UnsupportedError: The Brain has no ``loss_weight``, or its own optimizer step.
    """
    if brain._lightning.accumulate_by == "batches":
        return
    name = type(brain).__name__
    if not callable(getattr(brain, "loss_weight", None)):
        raise UnsupportedError(
            f"{OPTION} needs a method loss_weight(self, batch) of {name}, which returns the "
            "number of targets (tokens or frames) that compute_objectives takes its mean "
            "over. Define the method, or use accumulate_by='batches'."
        )
    for hook in MANUAL_HOOKS:
        if has_own(brain, hook) and not calls_ours(brain, hook):
            raise UnsupportedError(
                f"{OPTION} has no effect in {name}.{hook}. Derive {name} from "
                f"brain_lightning.Brain and call super().{hook}, or use "
                "accumulate_by='batches'."
            )


def is_full(brain: BrainProtocol) -> bool:
    """Returns whether the window ends with the current batch.

    Args:
        brain: Brain in training. Its ``step`` already counts this batch.
    """
    ends_early = brain._lightning.ends_window
    return brain.step % brain.grad_accumulation_factor == 0 or ends_early


def window_of(brain: BrainProtocol) -> Window:
    """Returns the current window.

    Args:
        brain: Brain in training.
    """
    return brain._lightning.window or Window()


def restart_window(brain: BrainProtocol) -> None:
    """Starts a new window after the gradients of the current window were dropped.

    Args:
        brain: Brain in training.
    """
    brain._lightning.window = Window(reference=window_of(brain).reference)


def restore_window(brain: BrainProtocol, saved: WindowState) -> None:
    """Restores a window.

    Args:
        brain: Brain in training.
        saved: State from ``Window.state``.
    """
    brain._lightning.window = Window(**saved)


def weight_of(brain: BrainProtocol, batch: Any, loss: Tensor) -> Tensor | None:
    """Returns the weight of a batch in its window.

    Args:
        brain: Brain in training.
        batch: Batch as the DataLoader returned it.
        loss: Return value of ``compute_objectives``.

    Returns:
        Scalar on the device of the loss, or None if all batches have the same weight.

    Raises:
        BrainTypeError: ``loss_weight`` did not return a number of 0 or more.
    """
    if brain._lightning.accumulate_by == "batches":
        return None
    found: Any = brain.loss_weight(batch)  # type: ignore[attr-defined]
    # Full precision, even if the loss has a lower precision.
    dtype = torch.promote_types(loss.dtype, torch.float32)
    number = found
    if isinstance(found, Tensor) and found.numel() == 1:
        if not found.is_cpu:
            return found.detach().reshape(()).to(loss.device, dtype)
        number = found.item()
    if isinstance(number, Real) and 0 <= number <= torch.finfo(dtype).max:  # type: ignore[operator]
        # Unlike torch.tensor, torch.full does not wait for the device.
        return torch.full((), float(number), dtype=dtype, device=loss.device)
    raise BrainTypeError(
        f"{type(brain).__name__}.loss_weight must return the number of targets of a batch (0 "
        f"or more), as a number or a tensor with one element, got {found!r:.80}"
    )


def share_of_window(brain: BrainProtocol, loss: Tensor, weight: Tensor | None) -> Tensor:
    """Returns the loss from which the backward pass starts: the batch's share of its window.

    Args:
        brain: Brain in training.
        loss: Return value of ``compute_objectives``.
        weight: Weight from ``weight_of``.
    """
    if weight is None:
        factor = brain.grad_accumulation_factor
        return loss if factor == 1 else loss / factor
    # Computed in the dtype of the weight, because the product may overflow in fp16.
    return loss.to(weight.dtype) * (weight / window_of(brain).reference)


def add_to_window(brain: BrainProtocol, weight: Tensor | None) -> None:
    """Counts a batch whose gradients are in the window: its loss is finite on all ranks.

    Args:
        brain: Brain in training.
        weight: Weight from ``weight_of``.
    """
    if weight is not None:
        window = window_of(brain)
        before = 0.0 if window.weight is None else window.weight
        brain._lightning.window = Window(before + weight, window.reference)


def end_window(brain: BrainProtocol, active: Iterable[Optimizer]) -> None:
    """Divides the gradients of a full window so that they are the mean over all its targets.

    All ranks call it, after gradients are averaged over ranks and before they are unscaled
    and clipped. A frozen optimizer accumulates gradients until it steps again. Its gradients
    are divided then, by the sum of the weights of the last window.

    Args:
        brain: Brain in training.
        active: Optimizers that are about to step.
    """
    window = window_of(brain)
    if window.weight is None:
        return
    weight = _mean_over_processes(brain, window.weight)
    # If no batch of the window has a target, there are no gradients.
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
    """Returns the mean of the weights over ranks, because gradients are averaged, too."""
    if not isinstance(weight, Tensor):
        # The window was restored, or its gradients were dropped, and no batch followed.
        weight = torch.full((), weight, device=brain.device)
    if not communicates():
        return weight
    # Ranks may have different dtypes, and all_reduce needs the same.
    weight = weight.to(torch.float64, copy=True)
    torch.distributed.all_reduce(weight)
    return weight / world_size()
