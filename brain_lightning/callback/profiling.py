"""``--profile_training``: profiles a few training steps with Lightning's PyTorchProfiler."""

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
    """Advances its schedule only in training steps, as SpeechBrain's profiler does."""

    STEP_FUNCTIONS = {"training_step"}  # noqa: RUF012  Lightning's own name and type


def profile(trainer: Trainer, brain: BrainProtocol, temporary: TemporaryAttributes) -> None:
    """Makes a Trainer profile the first training steps.

    The trace is written to the same folder as in SpeechBrain, ``output_folder/profiler_logs``
    (``speechbrain.utils.profiling.prepare_profiler``).

    Args:
        trainer: The Trainer, before it sets up its profiler.
        brain: The Brain, with the run options ``profile_warmup`` and ``profile_steps``.
        temporary: Records the changes.

    Raises:
        RunOptionError: If the Trainer already has a profiler, or there is no
            ``output_folder``.
    """
    # Lightning's type hints lack this attribute.
    users: Profiler = trainer.profiler  # type: ignore[attr-defined]
    if not isinstance(users, PassThroughProfiler):
        name = type(users).__name__
        raise RunOptionError(
            f"run option profile_training and Trainer(profiler={name}) cannot be used "
            "together. Remove one of them."
        )
    folder = hparam(brain, "output_folder")
    if folder is None:
        raise RunOptionError(
            "run option profile_training needs a folder for its trace. Set output_folder in "
            "hparams."
        )
    # The schedule has one more step than the run. If the schedule ended before the run,
    # Lightning 2.6 with torch 2.13 would find no events and raise an error.
    schedule = torch.profiler.schedule(
        wait=0, warmup=brain.profile_warmup, active=brain.profile_steps + 1
    )
    # with_stack is not set: with it, torch 2.13 on Python 3.11 reads freed memory.
    profiler = _TrainingProfiler(
        dirpath=Path(folder) / "profiler_logs",
        filename="profile",
        schedule=schedule,
        record_shapes=True,
    )
    temporary.set(trainer, "profiler", profiler)


def end_when_profiled(trainer: Trainer, brain: BrainProtocol, batches: int) -> None:
    """Ends the script after the last profiled step, as SpeechBrain does.

    Args:
        trainer: The Trainer in ``on_train_batch_end``.
        brain: The Brain in training, with ``profile_training``.
        batches: Number of training batches so far.

    Raises:
        SystemExit: If the profile is complete.
    """
    if batches == brain.profile_warmup + brain.profile_steps:
        profiler: Profiler = trainer.profiler  # type: ignore[attr-defined]
        profiler.describe()
        # Otherwise the next hook would restart the profiler, and nothing would close it.
        trainer.profiler = PassThroughProfiler()  # type: ignore[attr-defined]
        logger.info("The profiler finished, training is stopped.")
        raise SystemExit
