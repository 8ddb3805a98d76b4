"""The forward and backward pass of a batch that all processes give up where one has no memory.

DistributedDataParallel averages gradients while the backward pass computes them, and a process
that fails there leaves the others waiting. So the passes communicate nothing here. Then all
processes ask each other how it went, and average the gradients themselves.
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


def compute_alone(
    brain: BrainProtocol, batch: Any, update: RawUpdate, should_step: bool
) -> TrainingLoss:
    """The passes of a batch, after the hook before them, as SpeechBrain's ``fit_batch``.

    Args:
        brain: The Brain in training.
        batch: What the loader gave.
        update: How gradients are computed.
        should_step: Whether an update will follow.

    Returns:
        What the batch gave.
    """
    brain.on_fit_batch_start(batch, should_step)
    with brain.no_sync(not should_step):
        result = update.compute_gradients(batch)
    if should_step and not result.finite and brain.grad_accumulation_factor > 1:
        # There was no backward pass, in which DistributedDataParallel averages.
        average_window(brain)
    return result


def compute_together(
    brain: BrainProtocol, batch: Any, update: RawUpdate, should_step: bool
) -> TrainingLoss:
    """The same, of which all processes know afterwards whether it is done everywhere.

    Args:
        brain: See ``compute_alone``.
        batch: See ``compute_alone``.
        update: See ``compute_alone``.
        should_step: See ``compute_alone``.

    Returns:
        What the batch gave.

    Raises:
        torch.OutOfMemoryError: A process had no memory. Its own error is raised there, and
            the gradients are those of before in all of them.
    """
    flags = brain._lightning.flags
    if not flags.are_shared:
        return compute_alone(brain, batch, update, should_step)
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
        False if isinstance(result, Exception) else result.raised(),
        brain.device,
        # 1: a gradient of this batch alone; 2: one of earlier batches too.
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
        # As after a backward pass that has averaged.
        module.require_forward_param_sync = True
    return result


def average_window(brain: BrainProtocol) -> bool:
    """Averages the gradients of a window whose last batch has none.

    Args:
        brain: The Brain in training.

    Returns:
        Whether there are any, in all processes.
    """
    if parameters := averaged_parameters(brain):
        each = gather([p.grad is not None for p in parameters])
        has_gradient = map(any, zip(*each, strict=True))
        average_gradients(p for p, has in zip(parameters, has_gradient, strict=True) if has)
    return any(tensor.grad is not None for tensor in trained_parameters(brain))


def _attempt(
    brain: BrainProtocol, batch: Any, update: RawUpdate, should_step: bool
) -> TrainingLoss | Exception:
    """The passes, or the error for want of memory; what these hold is freed."""
    try:
        brain.on_fit_batch_start(batch, should_step)
        return update.compute_gradients(batch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        free(error, brain.device)
        return error


def _shared(flags: BatchFlags, result: object, failed_rank: int) -> Exception:
    """The error that this process raises where one of them had no memory."""
    error = result if isinstance(result, Exception) else None
    if error is None:
        error = torch.OutOfMemoryError(
            f"rank {failed_rank} ran out of memory in this batch, which all processes give up"
        )
    flags.share(error)
    return error


def fail_together(brain: BrainProtocol, temporary: TemporaryAttributes) -> None:
    """Has all processes give up a batch for which one of them has no memory.

    Args:
        brain: The Brain, its modules wrapped.
        temporary: Records what is changed.

    Raises:
        UnsupportedError: They would wait for each other within a forward or backward pass.
    """
    reason = _reason_against(brain)
    if reason is not None:
        raise UnsupportedError(
            f"oom_patience cannot be honoured on several processes: {reason}. Leave it out: "
            "then the run ends with the first process that has no memory, and is not saved"
        )
    temporary.set(brain._lightning, "fails_together", True)


def _reason_against(brain: BrainProtocol) -> str | None:
    name = type(brain).__name__
    if brain._lightning.sharding is not None:
        return "strategy='fsdp2' gathers and averages within the forward and backward pass"
    if wraps_itself(brain):
        return f"{name} wraps its modules itself, in _wrap_distributed"
    if steps_itself(brain) and not calls_ours(brain, "fit_batch"):
        return (
            f"{name}.fit_batch has a backward pass of its own, in which gradients are "
            "averaged. Call super().fit_batch(batch) of brain_lightning.Brain in it"
        )
    if any(module._comm_hooks for module in wrapped_modules(brain)):
        return f"{name} has registered a hook that averages gradients (register_comm_hook)"
    if any(module.static_graph for module in wrapped_modules(brain)):
        return "DDP's static_graph needs a first batch that averages within its backward pass"
    modules = [
        (n, part) for n, m in brain.modules.items() if m is not None for part in m.modules()
    ]
    for entry, part in modules:
        if isinstance(part, SyncBatchNorm):
            return f"{entry!r} has a SyncBatchNorm, which communicates in the forward pass"
        if isinstance(part, (Embedding, EmbeddingBag)) and part.sparse:
            return f"{entry!r} has sparse gradients, those of {type(part).__name__}"
    return None
