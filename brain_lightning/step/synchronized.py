"""The forward and backward pass of a batch that all ranks skip if one rank is out of memory.

DistributedDataParallel averages gradients during the backward pass. If one rank fails there,
the other ranks hang. With ``--oom_patience`` the two passes therefore communicate nothing.
After them, one collective tells all ranks whether a rank failed, and then the ranks average
their gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Embedding, EmbeddingBag, SyncBatchNorm

from brain_lightning.compat.speechbrain import calls_ours
from brain_lightning.distributed.batch_flags import BatchFlags
from brain_lightning.distributed.communication import gather, rank
from brain_lightning.distributed.gradients import (
    average_gradients,
    averaged_parameters,
    modules_with_gradients,
    share_buffers,
    wrapped_modules,
)
from brain_lightning.errors import UnsupportedError
from brain_lightning.optimizers.active import trained_parameters
from brain_lightning.protocol import BrainProtocol, steps_itself
from brain_lightning.temporary import TemporaryAttributes

from .losses import TrainingLoss, drop_gradients
from .out_of_memory import free, is_out_of_memory
from .wrap import wraps_itself

if TYPE_CHECKING:
    from .update import RawUpdate


def forward_backward(
    brain: BrainProtocol, batch: Any, update: RawUpdate, should_step: bool
) -> TrainingLoss:
    """Calls ``on_fit_batch_start`` and runs both passes, as SpeechBrain's ``fit_batch``.

    Args:
        brain: Brain in training.
        batch: Batch as the DataLoader returned it.
        update: Computes the gradients.
        should_step: Whether an optimizer step follows.

    Returns:
        The loss of the batch.
    """
    brain.on_fit_batch_start(batch, should_step)
    with brain.no_sync(not should_step):
        result = update.compute_gradients(batch)
    if should_step and not result.finite and brain.grad_accumulation_factor > 1:
        # DistributedDataParallel averages in the backward pass, which did not run.
        average_window(brain)
    return result


def synchronized_forward_backward(
    brain: BrainProtocol, batch: Any, update: RawUpdate, should_step: bool
) -> TrainingLoss:
    """Like ``forward_backward``, but all ranks use the batch or all ranks skip it.

    Args:
        brain: See ``forward_backward``.
        batch: See ``forward_backward``.
        update: See ``forward_backward``.
        should_step: See ``forward_backward``.

    Returns:
        The loss of the batch.

    Raises:
        torch.OutOfMemoryError: A rank is out of memory. That rank raises its own error. All
            ranks restore the gradients from before the batch.
    """
    flags = brain._lightning.flags
    if not flags.are_shared:
        return forward_backward(brain, batch, update, should_step)
    share_buffers(brain)
    kept: dict[Tensor, Tensor] = {
        p: p.grad.clone() for p in trained_parameters(brain) if p.grad is not None
    }
    with brain.no_sync():
        result = _attempt(brain, batch, update, should_step)
    averaged = averaged_parameters(brain) if should_step else []
    used = modules_with_gradients(brain) if should_step else []
    failed = isinstance(result, Exception)
    reduction = flags.reduce(
        False if isinstance(result, Exception) else result.nonfinite_flag(),
        brain.device,
        # 1: only this batch gave a gradient. 2: earlier batches gave one, too.
        [failed * (rank() + 1), *((p.grad is not None) + (p in kept) for p in averaged)],
    )
    is_finite = not flags.wait(reduction)
    failed_rank, *has_gradient = reduction.largest
    if failed_rank:
        drop_gradients(brain, None, kept)
        raise _shared(flags, result, failed_rank - 1)
    assert not isinstance(result, Exception)
    if not is_finite:
        drop_gradients(brain, result.scaled, kept)
    result.settle(is_finite)
    least = 1 if is_finite else 2
    average_gradients(p for p, has in zip(averaged, has_gradient, strict=True) if has >= least)
    for module in used:
        # DistributedDataParallel sets it in a backward pass that averages.
        module.require_forward_param_sync = True
    return result


def average_window(brain: BrainProtocol) -> bool:
    """Averages the gradients of an accumulation window whose last batch has none.

    Args:
        brain: Brain in training.

    Returns:
        Whether there are gradients. The result is the same on all ranks.
    """
    if parameters := averaged_parameters(brain):
        each = gather([p.grad is not None for p in parameters])
        has_gradient = map(any, zip(*each, strict=True))
        average_gradients(p for p, has in zip(parameters, has_gradient, strict=True) if has)
    return any(tensor.grad is not None for tensor in trained_parameters(brain))


def _attempt(
    brain: BrainProtocol, batch: Any, update: RawUpdate, should_step: bool
) -> TrainingLoss | Exception:
    """Returns the loss, or the out-of-memory error after freeing what the passes hold."""
    try:
        brain.on_fit_batch_start(batch, should_step)
        return update.compute_gradients(batch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        free(error, brain.device)
        return error


def _shared(flags: BatchFlags, result: object, failed_rank: int) -> Exception:
    """Returns the error that this rank raises if any rank is out of memory."""
    error = result if isinstance(result, Exception) else None
    if error is None:
        error = torch.OutOfMemoryError(
            f"rank {failed_rank} ran out of memory in this batch, so no rank uses the batch"
        )
    flags.share(error)
    return error


def synchronize_oom(brain: BrainProtocol, temporary: TemporaryAttributes) -> None:
    """Makes all ranks skip a batch if one of them is out of memory.

    Args:
        brain: Brain whose modules are wrapped.
        temporary: Records the changes, to undo them after the run.

    Raises:
        UnsupportedError: The ranks communicate within the forward or backward pass.
    """
    reason = _reason_against(brain)
    if reason is not None:
        raise UnsupportedError(
            f"oom_patience is not supported with several processes here: {reason}. Remove "
            "oom_patience. Without it, the first process that runs out of memory ends the "
            "run, and the run is not saved."
        )
    temporary.set(brain._lightning, "synchronizes_oom", True)


def _reason_against(brain: BrainProtocol) -> str | None:
    name = type(brain).__name__
    if brain._lightning.sharding is not None:
        return "strategy='fsdp2' communicates within the forward and backward pass"
    if wraps_itself(brain):
        return f"{name} overrides _wrap_distributed and wraps its modules itself"
    if steps_itself(brain) and not calls_ours(brain, "fit_batch"):
        return (
            f"{name}.fit_batch runs its own backward pass, in which gradients are averaged. "
            "Call super().fit_batch(batch) of brain_lightning.Brain instead"
        )
    if any(module._comm_hooks for module in wrapped_modules(brain)):
        return f"{name} averages gradients in a communication hook (register_comm_hook)"
    if any(module.static_graph for module in wrapped_modules(brain)):
        return "DDP's static_graph must average the first batch within its backward pass"
    modules = [
        (n, part) for n, m in brain.modules.items() if m is not None for part in m.modules()
    ]
    for entry, part in modules:
        if isinstance(part, SyncBatchNorm):
            return f"{entry!r} has a SyncBatchNorm, which communicates in the forward pass"
        if isinstance(part, (Embedding, EmbeddingBag)) and part.sparse:
            return f"{entry!r} has sparse gradients, because of a {type(part).__name__}"
    return None
