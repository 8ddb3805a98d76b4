"""The losses of batches: their forward pass; in training also check and backward pass.

In a training batch the host waits for the device once. The copy of the loss to the host is
queued behind the forward pass, then the backward pass is queued, and only then the host waits
for the copy. All processes decide together whether the loss is finite, before an optimizer
steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from brain_lightning.distributed.batch_flags import BatchFlags, Reduction
from brain_lightning.errors import BrainTypeError
from brain_lightning.host_copy import HostCopy
from brain_lightning.optimizers.active import trained_parameters
from brain_lightning.protocol import BrainProtocol, has_own

from .window import share_of_window, weight_of


class FiniteCheck:
    """Whether the loss of a batch is finite in all processes.

    Args:
        scaled: The loss that has the backward pass, one number.
        copy: Its copy to the host.
        flags: What the processes share of the batch.
    """

    def __init__(self, scaled: Tensor, copy: HostCopy, flags: BatchFlags) -> None:
        self._scaled, self._copy, self._flags = scaled, copy, flags
        self._reduction: Reduction | None = None

    def begin(self) -> None:
        """Begins to ask the other processes, if there are any."""
        if self._flags.are_shared:
            self._reduction = self._flags.reduce(self.raised(), self._scaled.device)

    def raised(self) -> Tensor | bool:
        """Whether it is not finite in this process; the host does not wait for a device."""
        return not self.here() if self._scaled.is_cpu else ~torch.isfinite(self._scaled)

    def here(self) -> bool:
        """Whether it is finite in this process, for which the host waits."""
        return isfinite(self._copy.wait().item())

    def everywhere(self) -> bool:
        """Whether it is finite in all processes: the same answer in each of them."""
        if self._reduction is None:
            return self.here()
        return not self._flags.wait(self._reduction)


class TrainingLoss:
    """What one training batch gave.

    Args:
        brain: The Brain in training.
        outputs: What ``compute_forward`` returned.
        loss: What ``compute_objectives`` returned, one number.
        weight: What the batch weighs in its window: see ``window.py``.

    Attributes:
        outputs: What ``compute_forward`` returned.
        loss: What ``compute_objectives`` returned.
        weight: See above.
        scaled: The share of the loss in its window, scaled for fp16.
        finite: Whether it may have an update; known after ``backward``.
    """

    finite: bool
    _is_together = False

    def __init__(
        self, brain: BrainProtocol, outputs: Any, loss: Tensor, weight: Tensor | None
    ) -> None:
        self._brain, self.outputs, self.loss, self.weight = brain, outputs, loss, weight
        self.scaled = brain.scaler.scale(share_of_window(brain, loss, weight))
        self._copy = None if loss.is_cpu else HostCopy(loss)
        self._version = loss._version
        self._check: FiniteCheck | None = None
        flags = brain._lightning.flags or BatchFlags()
        if self.scaled.is_cpu and not flags.are_shared:
            here = isfinite(self.scaled.item())
            self._decide(here, here)
            return
        copy = self._copy if self.scaled is loss else None
        self._check = check = FiniteCheck(self.scaled, copy or HostCopy(self.scaled), flags)
        if brain._lightning.fails_together and flags.are_shared:
            # ``together`` settles it.
            self._is_together = self.finite = True
            return
        check.begin()
        # One of several processes fails of a loss without gradients, as in SpeechBrain: the
        # others have begun to average theirs.
        has_gradients = self.scaled.requires_grad or flags.are_shared
        if not has_gradients or not _can_drop_gradients(brain):
            self._wait()

    def backward(self, backward: Callable[[], Any]) -> None:
        """The backward pass; a loss that is not finite leaves no gradients.

        Args:
            backward: Computes them.
        """
        if not self._is_together and self._check is not None:
            backward()
            self._wait(drops_gradients=True)
        elif self.finite:
            backward()

    def raised(self) -> Tensor | bool:
        """Whether it is not finite in this process, before ``settle``."""
        assert self._check is not None
        return self._check.raised()

    def settle(self, finite: bool) -> None:
        """Ends a check that processes make after the backward pass, with what else they ask.

        Args:
            finite: Whether the loss is finite in all of them.
        """
        check, self._check = self._check, None
        assert check is not None
        self._decide(finite, finite or check.here())

    def on_host(self) -> Tensor:
        """The detached loss, on the CPU."""
        # A hook may have changed it since it was copied.
        if self._copy is None or self.loss._version != self._version:
            return self.loss.detach().cpu()
        return self._copy.wait()

    def _wait(self, drops_gradients: bool = False) -> None:
        check, self._check = self._check, None
        assert check is not None
        finite = check.everywhere()
        if drops_gradients and not finite:
            # Before an error says so: whoever catches it may go on.
            drop_gradients(self._brain, self.scaled)
        self._decide(finite, finite or check.here())

    def _decide(self, finite: bool, here: bool) -> None:
        self.finite = finite
        # The default would only check a finite loss a second time.
        if not finite or has_own(self._brain, "check_loss_isfinite"):
            loss = self.scaled if finite or not here else self.scaled * torch.nan
            self._brain.check_loss_isfinite(loss)


def training_loss(brain: BrainProtocol, batch: Any) -> TrainingLoss:
    """The forward pass of a training batch, and the check of its loss.

    Args:
        brain: The Brain in training.
        batch: What the loader gave.

    Returns:
        The loss and what belongs to it.

    Raises:
        BrainTypeError: ``compute_objectives`` returned anything but one number
            in a tensor.
    """
    stage = brain._lightning.stage_type.TRAIN
    with brain.training_ctx:
        outputs = brain.compute_forward(batch, stage)
        loss = brain.compute_objectives(outputs, batch, stage)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise BrainTypeError(
            f"{type(brain).__name__}.compute_objectives must return a tensor with one "
            f"number to minimize, got {_describe(loss)}: reduce the loss, for example "
            "with .mean(), or override fit_batch"
        )
    return TrainingLoss(brain, outputs, loss, weight_of(brain, batch, loss))


@torch.no_grad()
def evaluation_loss(brain: BrainProtocol, batch: Any, stage: Any) -> Tensor:
    """The forward pass of an evaluation batch.

    Args:
        brain: The Brain that evaluates.
        batch: What the loader gave.
        stage: VALID or TEST.

    Returns:
        The detached loss, on its device.
    """
    with brain.evaluation_ctx:
        outputs = brain.compute_forward(batch, stage=stage)
        loss: Tensor = brain.compute_objectives(outputs, batch, stage=stage)
    return loss.detach()


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r:.80}"


def _can_drop_gradients(brain: BrainProtocol) -> bool:
    """Whether the gradients of this batch can be dropped, when its loss is not finite."""
    return (
        brain.grad_accumulation_factor == 1
        and not has_own(brain, "check_loss_isfinite")
        # Which raises an error in the backward pass of such a loss.
        and not torch.is_anomaly_enabled()
        and not any(p.grad is not None for p in trained_parameters(brain))
    )


def drop_gradients(
    brain: BrainProtocol, loss: Tensor | None, kept: Mapping[Tensor, Tensor] = {}
) -> None:
    """Drops the gradients of a batch.

    Args:
        brain: The Brain in training.
        loss: What had the backward pass; None where that is not known.
        kept: The gradients of earlier batches, by what they are of.
    """
    # The graph also has what nobody else knows of, but nothing of what it recomputes.
    leaves = () if loss is None else _leaves(loss)
    for tensor in chain(leaves, trained_parameters(brain)):
        tensor.grad = kept.get(tensor)


def _leaves(loss: Tensor) -> Iterable[Tensor]:
    """The tensors that the backward pass of a loss gives gradients to."""
    seen: set[Any] = set()
    nodes: list[Any] = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        if hasattr(node, "variable"):
            yield node.variable
