"""``--profile_training``: a few training steps under Lightning's PyTorchProfiler."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.profilers import PassThroughProfiler, Profiler, PyTorchProfiler

from brain_lightning.errors import RunOptionError
from brain_lightning.protocol import BrainProtocol, hparam
from brain_lightning.temporary import TemporaryAttributes

logger = logging.getLogger(__name__)


class _TrainingProfiler(PyTorchProfiler):
    """Goes by the training steps alone, as SpeechBrain's profiler."""

    STEP_FUNCTIONS = {"training_step"}  # noqa: RUF012  Lightning's own name and type


def profile(trainer: Trainer, brain: BrainProtocol, temporary: TemporaryAttributes) -> None:
    """Lets a Trainer profile the first training steps.

    The trace goes where SpeechBrain writes it, ``output_folder/profiler_logs``
    (``speechbrain.utils.profiling.prepare_profiler``).

    Args:
        trainer: The Trainer, before it sets up its profiler.
        brain: Its ``profile_warmup`` and ``profile_steps`` say which steps.
        temporary: Records what is changed.

    Raises:
        RunOptionError: The Trainer has a profiler already, or there is no
            ``output_folder``.
    """
    # An attribute that Lightning's type hints do not show.
    users: Profiler = trainer.profiler  # type: ignore[attr-defined]
    if not isinstance(users, PassThroughProfiler):
        name = type(users).__name__
        raise RunOptionError(
            f"run option profile_training and Trainer(profiler={name}) exclude each other: "
            "leave one of them out"
        )
    folder = hparam(brain, "output_folder")
    if folder is None:
        raise RunOptionError("profile_training writes to hparams['output_folder']: give it")
    # One step more than asked for: where a schedule ends first, Lightning 2.6 on torch
    # 2.13 finds no events and raises. The run ends first.
    schedule = torch.profiler.schedule(
        wait=0, warmup=brain.profile_warmup, active=brain.profile_steps + 1
    )
    # Without with_stack, with which torch 2.13 on Python 3.11 reads freed memory.
    profiler = _TrainingProfiler(
        dirpath=Path(folder) / "profiler_logs",
        filename="profile",
        schedule=schedule,
        record_shapes=True,
    )
    temporary.set(trainer, "profiler", profiler)


def end_when_profiled(trainer: Trainer, brain: BrainProtocol, batches: int) -> None:
    """Ends the script after the last step of the profile, as SpeechBrain does.

    Args:
        trainer: The Trainer in ``on_train_batch_end``.
        brain: The Brain in training, with ``profile_training``.
        batches: Training batches so far.

    Raises:
        SystemExit: The profile is complete.
    """
    if batches == brain.profile_warmup + brain.profile_steps:
        profiler: Profiler = trainer.profiler  # type: ignore[attr-defined]
        profiler.describe()
        # It would start anew with the next hook, and never be closed.
        trainer.profiler = PassThroughProfiler()  # type: ignore[attr-defined]
        logger.info("The profiler finished, training is stopped.")
        raise SystemExit
