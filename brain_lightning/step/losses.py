"""Computes the loss of a batch; in training also checks it and runs the backward pass.

In a training batch the host waits for the device only once. The forward pass, the copy of the
loss to the host and the backward pass are queued in this order. Then the host waits for the
copy. All ranks decide together whether the loss is finite, before an optimizer steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from brain_lightning.batch_content import ids_of
from brain_lightning.distributed.batch_flags import BatchFlags, Reduction
from brain_lightning.distributed.communication import rank
from brain_lightning.errors import BrainTypeError
from brain_lightning.host_copy import HostCopy
from brain_lightning.optimizers.active import trained_parameters
from brain_lightning.protocol import BrainProtocol, has_own

from .window import share_of_window, weight_of

logger = logging.getLogger(__name__)


class FiniteCheck:
    """Checks whether the loss of a batch is finite on all ranks.

    Args:
        scaled: Loss that the backward pass starts from, with one element.
        copy: Copy of that loss to the host.
        flags: Flags of the batch, which all ranks share.
    """

    def __init__(self, scaled: Tensor, copy: HostCopy, flags: BatchFlags) -> None:
        self._scaled, self._copy, self._flags = scaled, copy, flags
        self._reduction: Reduction | None = None

    def begin(self) -> None:
        """Starts the collective of all ranks, if there are several."""
        if self._flags.are_shared:
            self._reduction = self._flags.reduce(self.nonfinite_flag(), self._scaled.device)

    def nonfinite_flag(self) -> Tensor | bool:
        """Returns whether the loss is not finite on this rank. The host does not wait."""
        return not self.here() if self._scaled.is_cpu else ~torch.isfinite(self._scaled)

    def here(self) -> bool:
        """Returns whether the loss is finite on this rank. The host waits for the copy."""
        return isfinite(self._copy.wait().item())

    def everywhere(self) -> bool:
        """Returns whether the loss is finite on all ranks. The result is the same on each."""
        if self._reduction is None:
            return self.here()
        return not self._flags.wait(self._reduction)


class TrainingLoss:
    """The loss of one training batch.

    Args:
        brain: Brain in training.
        batch: Batch as the DataLoader returned it.
        outputs: Return value of ``compute_forward``.
        loss: Return value of ``compute_objectives``, with one element.
        weight: Weight of the batch in its accumulation window (see ``window.py``).

    Attributes:
        outputs: Return value of ``compute_forward``.
        loss: Return value of ``compute_objectives``.
        weight: Weight of the batch in its accumulation window.
        scaled: Share of the loss in its accumulation window, scaled for fp16.
        finite: Whether the loss is finite, so that the batch may be used. Known after
            ``backward``.
    """

    finite: bool
    _is_deferred = False

    def __init__(
        self,
        brain: BrainProtocol,
        batch: Any,
        outputs: Any,
        loss: Tensor,
        weight: Tensor | None,
    ) -> None:
        self._brain, self._batch = brain, batch
        self.outputs, self.loss, self.weight = outputs, loss, weight
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
        if brain._lightning.synchronizes_oom and flags.are_shared:
            # ``synchronized`` calls ``settle`` after the backward pass.
            self._is_deferred = self.finite = True
            return
        check.begin()
        # If one of several ranks has a loss without gradients, it fails, as in SpeechBrain.
        # The other ranks have already started to average their gradients.
        has_gradients = self.scaled.requires_grad or flags.are_shared
        if not has_gradients or not _can_drop_gradients(brain):
            self._wait()

    def backward(self, backward: Callable[[], Any]) -> None:
        """Runs the backward pass. A loss that is not finite leaves no gradients.

        Args:
            backward: Computes the gradients.
        """
        if not self._is_deferred and self._check is not None:
            backward()
            self._wait(drops_gradients=True)
        elif self.finite:
            backward()

    def nonfinite_flag(self) -> Tensor | bool:
        """Returns whether the loss is not finite on this rank. Call it before ``settle``."""
        assert self._check is not None
        return self._check.nonfinite_flag()

    def settle(self, finite: bool) -> None:
        """Ends a check that the ranks make after the backward pass, in a shared collective.

        Args:
            finite: Whether the loss is finite on all ranks.
        """
        check, self._check = self._check, None
        assert check is not None
        self._decide(finite, finite or check.here())

    def on_host(self) -> Tensor:
        """Returns the detached loss on the CPU."""
        # A hook may have changed the loss in place since it was copied.
        if self._copy is None or self.loss._version != self._version:
            return self.loss.detach().cpu()
        return self._copy.wait()

    def _wait(self, drops_gradients: bool = False) -> None:
        check, self._check = self._check, None
        assert check is not None
        finite = check.everywhere()
        if drops_gradients and not finite:
            # Dropped before ``_decide`` raises: a caller that catches the error may continue.
            drop_gradients(self._brain, self.scaled)
        self._decide(finite, finite or check.here())

    def _decide(self, finite: bool, here: bool) -> None:
        self.finite = finite
        if not here and (ids := ids_of(self._batch)):
            # The hook below does not know the batch, and all ranks call it.
            logger.warning("The loss of batch.id %s on rank %d is not finite.", ids, rank())
        # For a finite loss, the default hook would only repeat the check.
        if not finite or has_own(self._brain, "check_loss_isfinite"):
            loss = self.scaled if finite or not here else self.scaled * torch.nan
            self._brain.check_loss_isfinite(loss)


def training_loss(brain: BrainProtocol, batch: Any) -> TrainingLoss:
    """Runs the forward pass of a training batch and starts the check of its loss.

    Args:
        brain: Brain in training.
        batch: Batch as the DataLoader returned it.

    Returns:
        The loss, with the outputs of the forward pass.

    Raises:
        BrainTypeError: ``compute_objectives`` did not return a tensor with one element.
    """
    stage = brain._lightning.stage_type.TRAIN
    with brain.training_ctx:
        outputs = brain.compute_forward(batch, stage)
        loss = brain.compute_objectives(outputs, batch, stage)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise BrainTypeError(
            f"{type(brain).__name__}.compute_objectives must return a tensor with one "
            f"element, got {_describe(loss)}. Reduce the loss, for example with .mean(), or "
            "override fit_batch."
        )
    return TrainingLoss(brain, batch, outputs, loss, weight_of(brain, batch, loss))


@torch.no_grad()
def evaluation_loss(brain: BrainProtocol, batch: Any, stage: Any) -> Tensor:
    """Runs the forward pass of an evaluation batch.

    Args:
        brain: Brain in evaluation.
        batch: Batch as the DataLoader returned it.
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
    """Returns whether the gradients can be dropped if the loss turns out not finite."""
    return (
        brain.grad_accumulation_factor == 1
        and not has_own(brain, "check_loss_isfinite")
        # Anomaly detection raises an error in the backward pass of such a loss.
        and not torch.is_anomaly_enabled()
        and not any(p.grad is not None for p in trained_parameters(brain))
    )


def drop_gradients(
    brain: BrainProtocol, loss: Tensor | None, kept: Mapping[Tensor, Tensor] = {}
) -> None:
    """Drops the gradients of a batch.

    Args:
        brain: Brain in training.
        loss: Loss that the backward pass started from, or None if unknown.
        kept: Gradients of earlier batches to restore, by parameter.
    """
    # The graph also reaches tensors that no optimizer has, except tensors that activation
    # checkpointing recomputes.
    leaves = () if loss is None else _leaves(loss)
    for tensor in chain(leaves, trained_parameters(brain)):
        tensor.grad = kept.get(tensor)


def _leaves(loss: Tensor) -> Iterable[Tensor]:
    """Yields the leaf tensors to which the backward pass of a loss adds gradients."""
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
