"""SpeechBrain ``Brain`` recipes on PyTorch Lightning's ``Trainer``."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .brain import Brain
    from .callback import BrainCallback
    from .checkpoint import Checkpoint, average_checkpoints
    from .checkpoint_hooks import (
        mark_as_loader,
        mark_as_saver,
        mark_as_transfer,
        register_checkpoint_hooks,
    )
    from .checkpoints import Checkpointer
    from .curve_plot import CurvePlot
    from .distributed import (
        ddp_barrier,
        ddp_broadcast,
        if_main_process,
        main_process_only,
        run_on_main,
    )
    from .epochs import EpochCounter, EpochCounterWithStopper
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
    from .generate import lightning_module_class, to_lightning
    from .optimizers import OptimizerGroup
    from .patch import patch_speechbrain
    from .position import SaveableDataLoader
    from .run_options import RunOptions, parse_arguments
    from .samplers import DistributedSamplerWrapper, ReproducibleRandomSampler
    from .stage import Stage
    from .train_logger import LightningTrainLogger

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
    "Brain": "brain",
    "BrainCallback": "callback",
    "BrainTypeError": "errors",
    "Checkpoint": "checkpoint",
    "CheckpointError": "errors",
    "CheckpointSaveError": "errors",
    "Checkpointer": "checkpoints",
    "CurvePlot": "curve_plot",
    "DistributedSamplerWrapper": "samplers",
    "EpochCounter": "epochs",
    "EpochCounterWithStopper": "epochs",
    "HookStoppedError": "errors",
    "LightningTrainLogger": "train_logger",
    "MainProcessError": "errors",
    "NonFiniteLossError": "errors",
    "OptimizerGroup": "optimizers",
    "ReproducibleRandomSampler": "samplers",
    "RunOptionError": "errors",
    "RunOptions": "run_options",
    "SaveableDataLoader": "position",
    "Stage": "stage",
    "UnequalDataError": "errors",
    "UnsupportedError": "errors",
    "average_checkpoints": "checkpoint",
    "ddp_barrier": "distributed",
    "ddp_broadcast": "distributed",
    "if_main_process": "distributed",
    "lightning_module_class": "generate",
    "main_process_only": "distributed",
    "mark_as_loader": "checkpoint_hooks",
    "mark_as_saver": "checkpoint_hooks",
    "mark_as_transfer": "checkpoint_hooks",
    "parse_arguments": "run_options",
    "patch_speechbrain": "patch",
    "register_checkpoint_hooks": "checkpoint_hooks",
    "run_on_main": "distributed",
    "to_lightning": "generate",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{_FILES[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__, *globals()]
