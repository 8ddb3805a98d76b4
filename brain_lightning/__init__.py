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
from .epochs import EpochCounter, EpochCounterWithStopper
from .errors import (
    BrainTypeError,
    CheckpointError,
    CheckpointSaveError,
    HookStoppedError,
    NonFiniteLossError,
    RunOptionError,
    UnsupportedError,
)
from .generate import lightning_module_class, to_lightning
from .optimizers import OptimizerGroup
from .patch import patch_speechbrain
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
    "NonFiniteLossError",
    "OptimizerGroup",
    "ReproducibleRandomSampler",
    "RunOptionError",
    "RunOptions",
    "Stage",
    "UnsupportedError",
    "average_checkpoints",
    "lightning_module_class",
    "mark_as_loader",
    "mark_as_saver",
    "mark_as_transfer",
    "parse_arguments",
    "patch_speechbrain",
    "register_checkpoint_hooks",
    "to_lightning",
]
