"""SpeechBrain ``Brain`` recipes on PyTorch Lightning's ``Trainer``."""

from .brain import Brain
from .callback import BrainCallback
from .epochs import EpochCounter, EpochCounterWithStopper
from .errors import (
    BrainTypeError,
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
    "lightning_module_class",
    "parse_arguments",
    "patch_speechbrain",
    "to_lightning",
]
