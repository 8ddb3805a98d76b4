"""Reconciles Trainer arguments with run options: an explicit value overrides a default.

If two explicit values differ, an error with both names is raised.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities import rank_zero_info

from brain_lightning.checkpoints.hooks import save_shards
from brain_lightning.compat.speechbrain import is_speechbrains, set_processes
from brain_lightning.errors import RunOptionError, UnsupportedError
from brain_lightning.fsdp2.meta import check_memory
from brain_lightning.fsdp2.strategy import FSDP2Strategy
from brain_lightning.fsdp2.unsupported import check_not_sharded
from brain_lightning.lightning_internals import strategies
from brain_lightning.protocol import BrainProtocol, is_explicit, steps_itself
from brain_lightning.step.precision import autocast, gradient_scaler
from brain_lightning.step.wrap import wrap_modules, wraps_itself
from brain_lightning.temporary import TemporaryAttributes

from .profiling import profile
from .sharded_checkpoints import reconcile_sharded_checkpoints

# Lightning's names of mixed precision, and SpeechBrain's names.
MIXED_PRECISIONS = {"16-mixed": "fp16", "bf16-mixed": "bf16"}


def reconcile(trainer: Trainer, brain: BrainProtocol, temporary: TemporaryAttributes) -> None:
    """Translates the Trainer's arguments into the Brain's run options, for one run.

    Args:
        trainer: The Trainer, before it checks its configuration.
        brain: The Brain that is about to run.
        temporary: Records the changes.

    Raises:
        RunOptionError: If an argument of the Trainer contradicts a run option.
        UnsupportedError: If an earlier run sharded the modules, and the Trainer's strategy
            cannot train sharded modules.
    """
    reconcile_processes(trainer, brain, temporary)
    if trainer.training and not isinstance(trainer.strategy, FSDP2Strategy):
        check_not_sharded(brain)
    if strategies.is_parallel(trainer):
        _reconcile_wrapping(trainer, brain, temporary)
    if brain._lightning.sharding is None:
        check_memory(brain)
    _reconcile_clipping(trainer, brain, temporary)
    _reconcile_precision(trainer, brain, temporary)
    if trainer.accumulate_grad_batches != 1:
        _check_accumulation(brain, trainer.accumulate_grad_batches)
    if trainer.num_sanity_val_steps and trainer.training:
        # In VALID, recipes may read attributes that their on_stage_start sets in TRAIN.
        rank_zero_info(
            "The sanity check (num_sanity_val_steps) is disabled, because a Brain validates "
            "only after training."
        )
        temporary.set(trainer, "num_sanity_val_steps", 0)
    if brain.profile_training and trainer.training:
        profile(trainer, brain, temporary)


def reconcile_accumulation(
    trainer: Trainer, brain: BrainProtocol, temporary: TemporaryAttributes, length: int | None
) -> bool:
    """Makes the Brain accumulate gradients as the Trainer would, for one epoch.

    The Trainer calls for an optimizer step after each batch, and the Brain decides.

    Args:
        trainer: The Trainer at the start of a TRAIN stage, after a
            GradientAccumulationScheduler has set ``accumulate_grad_batches``.
        brain: The Brain.
        temporary: Records the changes.
        length: Number of batches in the epoch, or None if it is not known.

    Returns:
        Whether the optimizers step after an incomplete accumulation window at the end of the
        epoch. With ``accumulate_grad_batches`` they do, as in Lightning. Otherwise the
        incomplete window is dropped, as in SpeechBrain.

    Raises:
        RunOptionError: If the run option has another value, or the length of the epoch
            is not known in advance.
    """
    batches = trainer.accumulate_grad_batches
    if batches == 1:
        return False
    _check_accumulation(brain, batches)
    if length is None:
        raise RunOptionError(
            f"Trainer(accumulate_grad_batches={batches}) steps after the last batch, which is "
            "not known for a dataset without a length. Use the run option "
            f"grad_accumulation_factor={batches}, which drops an incomplete window."
        )
    temporary.set(brain, "grad_accumulation_factor", batches)
    temporary.set(trainer, "accumulate_grad_batches", 1)
    return True


def _check_accumulation(brain: BrainProtocol, batches: int) -> None:
    argument = f"accumulate_grad_batches={batches}"
    _check_conflict(brain, "grad_accumulation_factor", batches, argument)


def reconcile_processes(
    trainer: Trainer, brain: BrainProtocol, temporary: TemporaryAttributes
) -> None:
    """Sets the rank and the device of the Brain, also for the time after the run.

    Args:
        trainer: The Trainer, before or after it starts its processes.
        brain: The Brain that is about to run.
        temporary: Records the changes to the Trainer.

    Raises:
        RunOptionError: If an argument of the Trainer contradicts a run option.
    """
    if strategies.is_parallel(trainer):
        if trainer.num_devices * trainer.num_nodes > 1:
            # With this option a Brain uses a distributed sampler. (torchrun sets it already.)
            brain.distributed_launch = True
        set_processes(brain, trainer.global_rank, trainer.world_size)
        if is_explicit(brain, "distributed_backend"):
            backend = strategies.set_backend(trainer, brain.distributed_backend, temporary)
            argument = f"strategy=DDPStrategy(process_group_backend={backend!r})"
            _check_conflict(brain, "distributed_backend", backend, argument)
    _reconcile_device(trainer, brain)


def _reconcile_wrapping(
    trainer: Trainer, brain: BrainProtocol, temporary: TemporaryAttributes
) -> None:
    """Wraps each entry of ``modules`` in DDP, or shards it, depending on the strategy."""
    if isinstance(trainer.strategy, FSDP2Strategy):
        temporary.set(brain._lightning, "sharding", trainer.strategy.sharding)
        reconcile_sharded_checkpoints(brain, temporary)
        save_shards(temporary)
    arguments = strategies.ddp_arguments(trainer)
    if "find_unused_parameters" in arguments:
        unused = arguments["find_unused_parameters"]
        argument = f"strategy=DDPStrategy(find_unused_parameters={unused})"
        _check_conflict(brain, "find_unused_parameters", unused, argument)
        temporary.set(brain, "find_unused_parameters", unused)
    temporary.set(brain._lightning, "ddp_arguments", arguments)
    # The strategy would wrap the whole LightningModule in DDP.
    temporary.override(trainer.strategy, "configure_ddp", lambda: None)
    if not wraps_itself(brain):
        # Recipes that override on_fit_start call _wrap_distributed.
        temporary.override(brain, "_wrap_distributed", partial(wrap_modules, brain))


def _reconcile_device(trainer: Trainer, brain: BrainProtocol) -> None:
    root, mine = trainer.strategy.root_device, torch.device(brain.device)
    if mine.type == root.type and (root.index is None or mine.index in (None, root.index)):
        return
    _check_conflict(brain, "device", str(root), f"accelerator={root.type!r}")
    brain.device, brain.device_type = str(root), root.type
    brain.training_ctx = autocast(brain.device, brain.precision)
    brain.evaluation_ctx = autocast(brain.device, brain.eval_precision)
    brain.scaler = gradient_scaler(brain.device, brain.precision)


def _reconcile_clipping(
    trainer: Trainer, brain: BrainProtocol, temporary: TemporaryAttributes
) -> None:
    value, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    if algorithm is not None:
        # An overridden fit_batch may call SpeechBrain's optimizers_step, which clips norms.
        if algorithm != "norm" and steps_itself(brain) and is_speechbrains(brain):
            raise UnsupportedError(
                f"Trainer(gradient_clip_algorithm={algorithm!r}) has no effect on the "
                f"overridden fit_batch of {type(brain).__name__}. Remove the argument, or let "
                "the recipe subclass brain_lightning.Brain."
            )
        temporary.set(brain._lightning, "gradient_clip_algorithm", algorithm)
    if value is None:
        return
    _check_conflict(brain, "max_grad_norm", float(value), f"gradient_clip_val={value}")
    temporary.set(brain, "max_grad_norm", float(value))
    # Lightning raises an error for this argument with manual optimization.
    temporary.set(trainer, "gradient_clip_val", None)


def _reconcile_precision(
    trainer: Trainer, brain: BrainProtocol, temporary: TemporaryAttributes
) -> None:
    """Sets mixed precision in the Brain, because fit_batch may use its scaler and contexts."""
    plugin = trainer.precision_plugin
    if type(plugin) is not MixedPrecision:
        if plugin.precision != "32-true" and brain.precision != "fp32":
            _check_conflict(brain, "precision", None, f"precision={plugin.precision!r}")
        return
    precision, argument = MIXED_PRECISIONS[plugin.precision], f"precision={plugin.precision!r}"
    evaluation = brain.eval_precision if is_explicit(brain, "eval_precision") else precision
    _check_conflict(brain, "precision", precision, argument)
    temporary.set(brain, "precision", precision)
    temporary.set(brain, "eval_precision", evaluation)
    temporary.set(brain, "training_ctx", autocast(brain.device, precision))
    temporary.set(brain, "evaluation_ctx", autocast(brain.device, evaluation))
    # The plugin may have a scaler from the user.
    scaler = plugin.scaler or gradient_scaler(brain.device, precision)
    temporary.set(brain, "scaler", scaler)
    if scaler.is_enabled() and brain.checkpointer is not None:
        brain.checkpointer.add_recoverable("scaler", scaler, optional_load=True)
    temporary.set(trainer.strategy, "precision_plugin", Precision())


def _check_conflict(brain: BrainProtocol, option: str, value: Any, argument: str) -> None:
    chosen = getattr(brain, option)
    if is_explicit(brain, option) and chosen != value:
        raise RunOptionError(
            f"run option {option}={chosen!r} and Trainer({argument}) contradict each other. "
            "Remove one of them."
        )
