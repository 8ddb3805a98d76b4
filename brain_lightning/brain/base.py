"""The constructor of a Brain: run options, modules, device and counters."""

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
    # A Protocol as a base class would give its metaclass to each recipe's class.
    OptionValues = object

logger = logging.getLogger(__name__)


@hooks.register_checkpoint_hooks
class BrainBase(OlderAPI, OptionValues):
    """The attributes of a Brain, and the hooks that save and recover them.

    Args:
        modules: See ``Brain``.
        opt_class: See ``Brain``.
        hparams: See ``Brain``.
        run_opts: See ``Brain``.
        checkpointer: See ``Brain``.

    Attributes:
        modules: A ModuleDict on the device.
        hparams: The hyperparameters, in dot notation.
        device: The name of the device, for example ``cpu`` or ``cuda:0``.
        optimizer: The optimizer that the default ``init_optimizers`` creates.
        optimizers_dict: The optimizers that step together, by name.
        step: Number of batches so far in the current stage.
        optimizer_step: Number of optimizer steps so far, over all epochs.
        avg_train_loss: Running average of the training loss in this epoch.
        nonfinite_count: Number of losses in this epoch that were not finite.
        train_sampler: Sampler whose ``set_epoch`` is called before each epoch.
        training_ctx: Autocast context with the training precision.
        evaluation_ctx: Autocast context with the evaluation precision.
        scaler: The gradient scaler, enabled for fp16.
    """

    optimizer: Optimizer
    _lightning: LightningSettings
    _lightning_defaults = TrainerDefaults()
    # Recipes may read these names. A recipe may also assign them for its own use.
    stage_type = Setting()
    rank = Setting()
    world_size = Setting()
    progress = OptionSetting()
    progress_interval = OptionSetting()
    shard_eval = OptionSetting()
    async_save = OptionSetting()
    accumulate_by = OptionSetting()
    oom_patience = OptionSetting()
    # Loops that recipes copied from SpeechBrain read it. Here the Trainer has the profiler.
    profiler = None
    # SpeechBrain's name for the modules without a wrapper. Here each module has a wrapper.
    raw_modules = Fallback(lambda brain: brain.modules)

    def __init__(
        self,
        modules: Mapping[str, Module] | None = None,
        opt_class: Any = None,
        hparams: Mapping[str, Any] | None = None,
        run_opts: RunOptions | Mapping[str, Any] | None = None,
        checkpointer: Any = None,
    ) -> None:
        # The recipe may pass any other type: GAN recipes pass a list and unpack it.
        if isinstance(opt_class, Optimizer):
            raise BrainTypeError(
                "opt_class must be a callable that creates an optimizer from parameters, but "
                f"it is an instance of {type(opt_class).__name__}. Pass torch.optim.Adam or a "
                "lambda. In YAML, write !name:torch.optim.Adam."
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
            # older_api.py has properties of these names, which return the effective value.
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
            raise UnsupportedError(
                "async_save has no effect without a checkpointer. Pass a Checkpointer to the "
                "Brain, or remove async_save."
            )

    @property
    def _optimizer_step_limit_exceeded(self) -> bool:
        """Whether ``optimizer_step_limit`` is reached; loops in recipes read it."""
        limit = self.optimizer_step_limit
        return limit is not None and self.optimizer_step >= limit

    def print_trainable_parameters(self) -> None:
        """Logs the number of parameters, and the number of trainable parameters."""
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
            # The same number of digits as in SpeechBrain's message.
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
    """Adds the Brain to the recoverables of the checkpointer."""
    if speechbrain.is_checkpointer(checkpointer):
        hooks.share_with_speechbrain()
    if isinstance(checkpointer, Checkpointer):
        checkpointer.async_save = checkpointer.async_save or brain._lightning.async_save
    elif brain._lightning.async_save:
        raise UnsupportedError(
            f"async_save needs a brain_lightning.Checkpointer, but the checkpointer is a "
            f"{type(checkpointer).__name__}. Use brain_lightning.Checkpointer: it takes the "
            "same arguments and writes the same files."
        )
    if brain.debug and not brain.debug_persistently:
        _move_to_temporary_directory(checkpointer)
    if brain.scaler.is_enabled():
        checkpointer.add_recoverable("scaler", brain.scaler, optional_load=True)
    checkpointer.add_recoverable("brain", brain)


def _module_dict(modules: Any) -> ModuleDict:
    if isinstance(modules, ModuleDict):
        modules = dict(modules.items())
    # An experiment may set a module to None to leave it out.
    types = (Module, type(None))
    is_mapping = isinstance(modules, Mapping)
    if not is_mapping or not all(isinstance(m, types) for m in modules.values()):
        found = {n: type(m).__name__ for n, m in modules.items()} if is_mapping else None
        raise BrainTypeError(
            "modules must be a dict from names to torch.nn.Module, but got "
            f"{found or type(modules).__name__}. Pass Brain(modules={{'model': model}})."
        )
    return ModuleDict(dict(modules))


def _is_sharded(settings: LightningSettings) -> bool:
    """Whether the strategy shards modules; it then moves each module when it shards it."""
    overrides = settings.trainer_overrides
    return shards(overrides if "strategy" in overrides else settings.trainer_arguments)


def _move(modules: ModuleDict, device: str) -> None:
    """Moves modules to the device, except for meta modules, which fsdp2 materializes."""
    real = {name: m for name, m in modules.items() if m is not None and not is_meta(m)}
    ModuleDict(real).to(device)
    # Call to() of each module too: a module may override to() to move more than parameters,
    # as SpeechBrain's InputNormalization does.
    for name, module in real.items():
        modules[name] = module.to(device)


def _move_to_temporary_directory(checkpointer: Any) -> None:
    """Keeps debug mode from writing into the checkpoint folder of real runs."""
    if not hasattr(checkpointer, "checkpoints_dir"):
        return
    directory = tempfile.mkdtemp(prefix="brain_lightning_debug_")
    logger.info("Debug mode: checkpoints are saved in the temporary directory %s.", directory)
    checkpointer.checkpoints_dir = Path(directory)
    weakref.finalize(checkpointer, shutil.rmtree, directory, ignore_errors=True)
