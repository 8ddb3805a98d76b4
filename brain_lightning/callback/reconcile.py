"""Trainer arguments meet run options: an explicit value beats a default.

Two explicit values that differ are an error that names both.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities import rank_zero_info

from brain_lightning.compat.speechbrain import is_speechbrains, set_processes
from brain_lightning.errors import RunOptionError, UnsupportedError
from brain_lightning.fsdp2.sharding import Sharding
from brain_lightning.fsdp2.strategy import FSDP2Strategy
from brain_lightning.lightning_internals import strategies
from brain_lightning.protocol import BrainProtocol, is_explicit, steps_itself
from brain_lightning.step.precision import autocast, gradient_scaler
from brain_lightning.step.wrap import wrap_modules, wraps_itself
from brain_lightning.temporary import TemporaryAttributes

from .profiling import profile

# Lightning's names of mixed precision, in SpeechBrain's words.
MIXED_PRECISIONS = {"16-mixed": "fp16", "bf16-mixed": "bf16"}


def reconcile(trainer: Trainer, brain: BrainProtocol, temporary: TemporaryAttributes) -> None:
    """Translates the Trainer's arguments into the Brain's run options, for one run.

    Args:
        trainer: The Trainer, before it checks its configuration.
        brain: The Brain that is going to run.
        temporary: Records what is changed.

    Raises:
        RunOptionError: An argument of the Trainer contradicts a run option.
    """
    reconcile_processes(trainer, brain, temporary)
    if strategies.is_parallel(trainer):
        _reconcile_wrapping(trainer, brain, temporary)
    _reconcile_clipping(trainer, brain, temporary)
    _reconcile_precision(trainer, brain, temporary)
    if trainer.accumulate_grad_batches != 1:
        _check_accumulation(brain, trainer.accumulate_grad_batches)
    if trainer.num_sanity_val_steps and trainer.training:
        # Recipes read in VALID what their on_stage_start set.
        rank_zero_info("A Brain validates in its own order: no sanity check.")
        temporary.set(trainer, "num_sanity_val_steps", 0)
    if brain.profile_training and trainer.training:
        profile(trainer, brain, temporary)


def reconcile_accumulation(
    trainer: Trainer, brain: BrainProtocol, temporary: TemporaryAttributes, length: int | None
) -> bool:
    """Accumulates gradients in the Brain as the Trainer would, for one epoch.

    The Trainer asks for an update after each batch, and the Brain decides.

    Args:
        trainer: The Trainer at the start of a TRAIN stage, when a
            GradientAccumulationScheduler has set its number.
        brain: The Brain.
        temporary: Records what is changed.
        length: Batches in the epoch, or None where that is not known.

    Returns:
        Whether an incomplete window at the end makes an update: Lightning's rule
        where the Trainer has accumulate_grad_batches, else it is dropped.

    Raises:
        RunOptionError: The run option is another number, or the end of the epoch
            cannot be known in advance.
    """
    batches = trainer.accumulate_grad_batches
    if batches == 1:
        return False
    _check_accumulation(brain, batches)
    if length is None:
        raise RunOptionError(
            f"Trainer(accumulate_grad_batches={batches}) updates on the last batch, which is "
            "not known for a set without a length: use the run option "
            f"grad_accumulation_factor={batches}, which drops an incomplete window"
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
    """Gives the Brain its rank and its device, which it keeps after the run.

    Args:
        trainer: The Trainer, before or after it has started its processes.
        brain: The Brain that is going to run.
        temporary: Records what is changed on the Trainer.

    Raises:
        RunOptionError: An argument of the Trainer contradicts a run option.
    """
    if strategies.is_parallel(trainer):
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
    """Each entry of ``modules`` in its own DDP, or in shards, as the strategy says."""
    if isinstance(trainer.strategy, FSDP2Strategy):
        _reconcile_sharding(brain, trainer.strategy.sharding, temporary)
    arguments = strategies.ddp_arguments(trainer)
    if "find_unused_parameters" in arguments:
        unused = arguments["find_unused_parameters"]
        argument = f"strategy=DDPStrategy(find_unused_parameters={unused})"
        _check_conflict(brain, "find_unused_parameters", unused, argument)
        temporary.set(brain, "find_unused_parameters", unused)
    temporary.set(brain._lightning, "ddp_arguments", arguments)
    # The strategy's own, around the whole module.
    temporary.override(trainer.strategy, "configure_ddp", lambda: None)
    if not wraps_itself(brain):
        # Recipes that override on_fit_start call it by this name.
        temporary.override(brain, "_wrap_distributed", partial(wrap_modules, brain))


def _reconcile_sharding(
    brain: BrainProtocol, sharding: Sharding, temporary: TemporaryAttributes
) -> None:
    if brain._lightning.shard_eval and not sharding.gather_to_evaluate:
        raise RunOptionError(
            "--shard_eval gives the processes different batches, and with "
            "FSDP2Strategy(gather_to_evaluate=False) they have to evaluate the same ones: "
            "leave one of the two out"
        )
    temporary.set(brain._lightning, "sharding", sharding)


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
        # SpeechBrain's own optimizers_step, which a fit_batch may call, knows norms alone.
        if algorithm != "norm" and steps_itself(brain) and is_speechbrains(brain):
            raise UnsupportedError(
                f"Trainer(gradient_clip_algorithm={algorithm!r}) has no effect on a fit_batch "
                f"of {type(brain).__name__}'s own: leave it out, or give the recipe our "
                "Brain, from brain_lightning import Brain"
            )
        temporary.set(brain._lightning, "gradient_clip_algorithm", algorithm)
    if value is None:
        return
    _check_conflict(brain, "max_grad_norm", float(value), f"gradient_clip_val={value}")
    temporary.set(brain, "max_grad_norm", float(value))
    # Lightning refuses to clip for a module with manual optimization.
    temporary.set(trainer, "gradient_clip_val", None)


def _reconcile_precision(
    trainer: Trainer, brain: BrainProtocol, temporary: TemporaryAttributes
) -> None:
    """Mixed precision is the Brain's: its fit_batch may use its scaler and contexts itself."""
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
    # The user's scaler, where the plugin was given or has made one.
    scaler = plugin.scaler or gradient_scaler(brain.device, precision)
    temporary.set(brain, "scaler", scaler)
    if scaler.is_enabled() and brain.checkpointer is not None:
        brain.checkpointer.add_recoverable("scaler", scaler, optional_load=True)
    temporary.set(trainer.strategy, "precision_plugin", Precision())


def _check_conflict(brain: BrainProtocol, option: str, value: Any, argument: str) -> None:
    chosen = getattr(brain, option)
    if is_explicit(brain, option) and chosen != value:
        raise RunOptionError(
            f"run option {option}={chosen!r} and Trainer({argument}) contradict each other: "
            "leave one of them out"
        )
