"""What a Brain is made of before anything runs: options, modules, device and counters."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch.nn import Module, ModuleDict
from torch.optim import Optimizer

from brain_lightning.checkpoints import hooks
from brain_lightning.checkpoints.checkpointer import Checkpointer
from brain_lightning.compat import speechbrain
from brain_lightning.errors import BrainTypeError, UnsupportedError
from brain_lightning.fsdp2.meta import is_meta
from brain_lightning.fsdp2.strategy import shards
from brain_lightning.loggers.console import abbreviated, show_information
from brain_lightning.options.resolve import DEPRECATED_PRECISIONS, resolve_run_options
from brain_lightning.options.run_options import RunOptions
from brain_lightning.protocol import (
    OURS_ALONE,
    LightningSettings,
    TrainerDefaults,
    trainer_arguments,
)
from brain_lightning.stage import Stage
from brain_lightning.step.older_api import Fallback, OlderAPI
from brain_lightning.step.precision import autocast, device_type, gradient_scaler, infer_device

from .settings import OptionSetting, Setting

if TYPE_CHECKING:
    from brain_lightning.protocol import OptionValues
else:
    # As a base, a Protocol would give each recipe's class its metaclass.
    OptionValues = object

logger = logging.getLogger(__name__)


@hooks.register_checkpoint_hooks
class BrainBase(OlderAPI, OptionValues):
    """The attributes of a Brain, and how they are saved.

    Args:
        modules: See ``Brain``.
        opt_class: See ``Brain``.
        hparams: See ``Brain``.
        run_opts: See ``Brain``.
        checkpointer: See ``Brain``.

    Attributes:
        modules: A ModuleDict on the device.
        hparams: The hyperparameters, in dot notation.
        device: The name of the device, ``cpu`` or ``cuda:0``.
        optimizer: The optimizer of the default ``init_optimizers``.
        optimizers_dict: The optimizers that step together, by name.
        step: Batches so far in the stage that runs.
        optimizer_step: Updates so far, over all epochs.
        avg_train_loss: Running average of the training loss in this epoch.
        nonfinite_count: Losses of this epoch that were not finite.
        train_sampler: Its ``set_epoch`` is called before each epoch.
        training_ctx: Autocast of the training precision.
        evaluation_ctx: Autocast of the evaluation precision.
        scaler: The gradient scaler, on for fp16.
    """

    optimizer: Optimizer
    _lightning: LightningSettings
    _lightning_defaults = TrainerDefaults()
    # For recipes that read them; one that takes such a name has it for itself.
    stage_type = Setting()
    rank = Setting()
    world_size = Setting()
    progress = OptionSetting()
    progress_interval = OptionSetting()
    shard_eval = OptionSetting()
    async_save = OptionSetting()
    accumulate_by = OptionSetting()
    oom_patience = OptionSetting()
    # SpeechBrain's, for loops that recipes have copied from it: here the Trainer has one.
    profiler = None
    # SpeechBrain's name for the modules without a wrapper, which here each has on its own.
    raw_modules = Fallback(lambda brain: brain.modules)

    def __init__(
        self,
        modules: Mapping[str, Module] | None = None,
        opt_class: Any = None,
        hparams: Mapping[str, Any] | None = None,
        run_opts: RunOptions | Mapping[str, Any] | None = None,
        checkpointer: Any = None,
    ) -> None:
        # Anything else is the recipe's to use: GANs give a list and unpack it.
        if isinstance(opt_class, Optimizer):
            raise BrainTypeError(
                "opt_class must make an optimizer of parameters, got an instance of "
                f"{type(opt_class).__name__}: give torch.optim.Adam, a lambda, or in YAML "
                "!name:torch.optim.Adam"
            )
        self.opt_class = opt_class
        self.checkpointer = checkpointer
        self.hparams = SimpleNamespace(**(hparams or {}))
        if not isinstance(run_opts, RunOptions):
            run_opts = RunOptions.from_dictionary(run_opts or {})
        values, explicit = resolve_run_options(run_opts, hparams or {})
        self._lightning = LightningSettings(
            Stage,
            explicit_options=explicit,
            trainer_arguments=trainer_arguments((hparams or {}).get("trainer")),
            trainer_overrides={**self._lightning_defaults.overrides, **run_opts.trainer},
            trainer_callbacks=self._lightning_defaults.callbacks,
            counts_valid_steps="valid_step" not in vars(self),
            **{name: values.pop(name) for name in OURS_ALONE},
        )
        for name in DEPRECATED_PRECISIONS:
            # What is in force, by whatever option: see older_api.py.
            del values[name]
        vars(self).update(values)
        if self.distributed_launch:
            self._lightning.rank = int(os.environ["RANK"])
            self._lightning.world_size = int(os.environ.get("WORLD_SIZE", 1))

        self.device: str = self.device or infer_device()
        self.device_type = device_type(self.device)
        if self.device_type == "cuda":
            torch.cuda.set_device(torch.device(self.device).index or 0)
        self.modules = _module_dict(modules or {})
        if not _is_sharded(self._lightning):
            _move(self.modules, self.device)

        self.training_ctx: Any = autocast(self.device, self.precision)
        self.evaluation_ctx: Any = autocast(self.device, self.eval_precision)
        self.scaler = gradient_scaler(self.device, self.precision)

        self.optimizers_dict: dict[str, Optimizer] | None = None
        self.train_sampler: Any = None
        self.step = 0
        self.optimizer_step = 0
        self.avg_train_loss = 0.0
        self.nonfinite_count = 0

        if not self.tqdm_colored_bar:
            self.tqdm_barcolor: dict[str, str] = dict.fromkeys(self.tqdm_barcolor, "")
        show_information()
        self.print_trainable_parameters()
        if checkpointer is not None:
            _join(self, checkpointer)
        elif self._lightning.async_save:
            raise UnsupportedError("async_save saves nothing: give the Brain a checkpointer")

    @property
    def _optimizer_step_limit_exceeded(self) -> bool:
        """Whether ``optimizer_step_limit`` is reached; loops of recipes ask."""
        limit = self.optimizer_step_limit
        return limit is not None and self.optimizer_step >= limit

    def print_trainable_parameters(self) -> None:
        """Logs how many parameters there are, and how many of them can be trained."""
        total = sum(p.numel() for p in self.modules.parameters())
        trainable = sum(p.numel() for p in self.modules.parameters() if p.requires_grad)
        if not total:
            logger.warning("The model has no parameters!")
        elif not trainable:
            logger.warning("The model has no trainable parameters!")
        logger.info(
            "%s Model Statistics:\n"
            "* Total Number of Trainable Parameters: %s\n"
            "* Total Number of Parameters: %s\n"
            "* Trainable Parameters represent %.*f%% of the total size.",
            type(self).__name__,
            abbreviated(trainable),
            abbreviated(total),
            # SpeechBrain's wording, to the digit.
            4 if total else 2,
            100 * trainable / max(total, 1),
        )

    @hooks.mark_as_saver
    def _save(self, path: str | PathLike[str]) -> None:
        names = ("step", "avg_train_loss", "optimizer_step")
        state = {name: getattr(self, name) for name in names}
        Path(path).write_text(yaml.dump(state), encoding="utf-8")

    @hooks.mark_as_loader
    def _recover(self, path: str | PathLike[str], end_of_epoch: bool) -> None:
        state = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        self.step = state["step"]
        self.avg_train_loss = state["avg_train_loss"]
        # SpeechBrain before 1.0 saved no optimizer_step.
        self.optimizer_step = state.get("optimizer_step", state["step"])


def _join(brain: BrainBase, checkpointer: Any) -> None:
    """Adds the Brain to what the checkpointer recovers."""
    if speechbrain.is_checkpointer(checkpointer):
        hooks.share_with_speechbrain()
    if isinstance(checkpointer, Checkpointer):
        checkpointer.async_save = checkpointer.async_save or brain._lightning.async_save
    elif brain._lightning.async_save:
        raise UnsupportedError(
            f"async_save needs brain_lightning.Checkpointer, and the checkpointer is a "
            f"{type(checkpointer).__name__}: its files and arguments are the same"
        )
    if brain.debug and not brain.debug_persistently:
        _move_to_temporary_directory(checkpointer)
    if brain.scaler.is_enabled():
        checkpointer.add_recoverable("scaler", brain.scaler, optional_load=True)
    checkpointer.add_recoverable("brain", brain)


def _module_dict(modules: Any) -> ModuleDict:
    if isinstance(modules, ModuleDict):
        modules = dict(modules.items())
    # None stands for a module that an experiment leaves out.
    types = (Module, type(None))
    is_mapping = isinstance(modules, Mapping)
    if not is_mapping or not all(isinstance(m, types) for m in modules.values()):
        found = {n: type(m).__name__ for n, m in modules.items()} if is_mapping else None
        raise BrainTypeError(
            "modules must be a dict of torch.nn.Module by name, "
            f"got {found or type(modules).__name__}: Brain(modules={{'model': model}})"
        )
    return ModuleDict(dict(modules))


def _is_sharded(settings: LightningSettings) -> bool:
    """Whether modules are moved to the device one by one, when each is sharded."""
    overrides = settings.trainer_overrides
    return shards(overrides if "strategy" in overrides else settings.trainer_arguments)


def _move(modules: ModuleDict, device: str) -> None:
    """Moves modules to the device; those on the meta device are for fsdp2 to materialize."""
    real = {name: m for name, m in modules.items() if m is not None and not is_meta(m)}
    ModuleDict(real).to(device)
    # A second time one by one: a module may override to() to move what is no parameter,
    # as SpeechBrain's InputNormalization does.
    for name, module in real.items():
        modules[name] = module.to(device)


def _move_to_temporary_directory(checkpointer: Any) -> None:
    """Debug mode must not write among the checkpoints of real runs."""
    if not hasattr(checkpointer, "checkpoints_dir"):
        return
    directory = tempfile.mkdtemp(prefix="brain_lightning_debug_")
    logger.info("Debug mode: checkpoints go to the temporary directory %s", directory)
    checkpointer.checkpoints_dir = Path(directory)
    weakref.finalize(checkpointer, shutil.rmtree, directory, ignore_errors=True)
