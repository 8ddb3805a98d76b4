"""SpeechBrain ``Brain`` recipes on PyTorch Lightning's ``Trainer``."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .brain.brain import Brain
    from .brain.patch import patch_speechbrain
    from .callback.brain_callback import BrainCallback
    from .checkpoints.checkpoint import Checkpoint, average_checkpoints
    from .checkpoints.checkpointer import Checkpointer
    from .checkpoints.hooks import (
        mark_as_loader,
        mark_as_saver,
        mark_as_transfer,
        register_checkpoint_hooks,
    )
    from .data.dataloaders import SaveableDataLoader
    from .data.samplers import DistributedSamplerWrapper, ReproducibleRandomSampler
    from .distributed.communication import (
        ddp_barrier,
        ddp_broadcast,
        if_main_process,
        main_process_only,
        run_on_main,
    )
    from .errors import (
        BrainTypeError,
        CheckpointError,
        CheckpointSaveError,
        HookStoppedError,
        MainProcessError,
        NonFiniteLossError,
        RunOptionError,
        UnequalDataError,
        UnsupportedError,
    )
    from .loggers.curve_plot import CurvePlot
    from .loggers.train_logger import LightningTrainLogger
    from .module.to_lightning import lightning_module_class, to_lightning
    from .options.run_options import RunOptions, parse_arguments
    from .stage import Stage
    from .stages.epochs import EpochCounter, EpochCounterWithStopper
    from .step.optimizers import OptimizerGroup

__all__ = [
    "Brain",
    "BrainCallback",
    "BrainTypeError",
    "Checkpoint",
    "CheckpointError",
    "CheckpointSaveError",
    "Checkpointer",
    "CurvePlot",
    "DistributedSamplerWrapper",
    "EpochCounter",
    "EpochCounterWithStopper",
    "HookStoppedError",
    "LightningTrainLogger",
    "MainProcessError",
    "NonFiniteLossError",
    "OptimizerGroup",
    "ReproducibleRandomSampler",
    "RunOptionError",
    "RunOptions",
    "SaveableDataLoader",
    "Stage",
    "UnequalDataError",
    "UnsupportedError",
    "average_checkpoints",
    "ddp_barrier",
    "ddp_broadcast",
    "if_main_process",
    "lightning_module_class",
    "main_process_only",
    "mark_as_loader",
    "mark_as_saver",
    "mark_as_transfer",
    "parse_arguments",
    "patch_speechbrain",
    "register_checkpoint_hooks",
    "run_on_main",
    "to_lightning",
]

# Where each is; loaded when it is asked for, so that `brain-lightning --help` need not wait.
_FILES = {
    "Brain": "brain.brain",
    "BrainCallback": "callback.brain_callback",
    "BrainTypeError": "errors",
    "Checkpoint": "checkpoints.checkpoint",
    "CheckpointError": "errors",
    "CheckpointSaveError": "errors",
    "Checkpointer": "checkpoints.checkpointer",
    "CurvePlot": "loggers.curve_plot",
    "DistributedSamplerWrapper": "data.samplers",
    "EpochCounter": "stages.epochs",
    "EpochCounterWithStopper": "stages.epochs",
    "HookStoppedError": "errors",
    "LightningTrainLogger": "loggers.train_logger",
    "MainProcessError": "errors",
    "NonFiniteLossError": "errors",
    "OptimizerGroup": "step.optimizers",
    "ReproducibleRandomSampler": "data.samplers",
    "RunOptionError": "errors",
    "RunOptions": "options.run_options",
    "SaveableDataLoader": "data.dataloaders",
    "Stage": "stage",
    "UnequalDataError": "errors",
    "UnsupportedError": "errors",
    "average_checkpoints": "checkpoints.checkpoint",
    "ddp_barrier": "distributed.communication",
    "ddp_broadcast": "distributed.communication",
    "if_main_process": "distributed.communication",
    "lightning_module_class": "module.to_lightning",
    "main_process_only": "distributed.communication",
    "mark_as_loader": "checkpoints.hooks",
    "mark_as_saver": "checkpoints.hooks",
    "mark_as_transfer": "checkpoints.hooks",
    "parse_arguments": "options.run_options",
    "patch_speechbrain": "brain.patch",
    "register_checkpoint_hooks": "checkpoints.hooks",
    "run_on_main": "distributed.communication",
    "to_lightning": "module.to_lightning",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{_FILES[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__, *globals()]
