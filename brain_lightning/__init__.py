"""SpeechBrain ``Brain`` recipes on PyTorch Lightning's ``Trainer``."""

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

__all__ = [
    "Brain",
    "BrainCallback",
    "BrainTypeError",
    "Checkpoint",
    "CheckpointError",
    "CheckpointSaveError",
    "Checkpointer",
    "DistributedSamplerWrapper",
    "EpochCounter",
    "EpochCounterWithStopper",
    "HookStoppedError",
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
