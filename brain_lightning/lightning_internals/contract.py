"""The private names of Lightning and torch that this package uses.

Each row has the reason why no public name can be used instead.
``tests/lightning_internals/test_contract.py`` fails if an installed version lacks a private
name, or if the package uses a private name without a row. If the installed release lacks a
name, a run raises ``UnsupportedError`` before training.
"""

from __future__ import annotations

import inspect
import sys
from functools import cache
from pkgutil import resolve_name
from typing import Any, NamedTuple

import torch

from brain_lightning.compat.versions import LIGHTNING, NEWEST_LIGHTNING, TESTED_LIGHTNING
from brain_lightning.errors import UnsupportedError


class Row(NamedTuple):
    """One private name.

    Attributes:
        owner: A module, or ``module:class``, or ``module:class.function``.
        name: An attribute of the module or the class, or an attribute that ``__init__`` or
            the function sets.
        why: Why no public name can be used instead.
        since: The first Lightning version with this name; the oldest tested version is 2.4.
    """

    owner: str
    name: str
    why: str
    since: str = "2.4"


_TRAINER = "lightning.pytorch.trainer.trainer:Trainer"
_CONNECTORS = "lightning.pytorch.trainer.connectors"
_FIT = "lightning.pytorch.loops.fit_loop:_FitLoop"
_EPOCH = "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop"
_EVALUATION = "lightning.pytorch.loops.evaluation_loop:_EvaluationLoop"
_COMBINED = "lightning.pytorch.utilities.combined_loader:CombinedLoader"
_DDP = "lightning.pytorch.strategies.ddp:DDPStrategy"
_LOGGER_CONNECTOR = f"{_CONNECTORS}.logger_connector.logger_connector:_LoggerConnector"
_PRUNE = "torch.nn.utils.prune:BasePruningMethod.apply"
_LOGGERS = "lightning.pytorch.loggers"

_ORDER = "SpeechBrain's order of events needs a point at which Lightning calls no hook"
_FETCHED = "a batch must be fetched when SpeechBrain fetches it"
_EXHAUSTION = "a stage must end when its loader is exhausted, not after a number of batches"
_SHARDED = "Lightning shards the training data, but does not find the user's wrapped loaders"
_SIGNALS = "if handlers are restored in on_train_start, an earlier SIGTERM is not handled"
_LAST = 'Lightning calls no hook between fit(ckpt_path="last") and the choice of a file'
_LEAN = "calling hooks that no callback overrides takes longer than a step of a small model"
_LOGGED = "Lightning collects the values that callbacks log with self.log in each batch"
_STEP = "logging a Brain's metrics with self.log takes longer than a step of a small model"
_STEPS = "global_step must be equal to the number of optimizer steps of the Brain"
_SAMPLER = "the Trainer's argument use_distributed_sampler has no public attribute"
_RELOADED = "a resumed run must reload its loaders in the same epochs as without interruption"
_NAMES = "metrics are read back from the logger, where the prefix is part of their names"
_WHOLE_MODULE = "this argument for one DDP around the whole module has no public attribute"
_ROWS = "Lightning deletes or rewrites the CSV file without calling a hook before"
_PRUNED = "ModelPruning does not save the weights to which its lottery ticket resets"
_NUMBERED = "reading the public property would choose a version and create its folder"

_SEARCHED = "the search runs as a trial, and the callback's arguments have no public attribute"
_LR_FINDER = "lightning.pytorch.callbacks.lr_finder:LearningRateFinder"
_SIZE_FINDER = "lightning.pytorch.callbacks.batch_size_finder:BatchSizeFinder"

# fmt: off
LIGHTNING_PARTS = (
    # Imports.
    Row("lightning.pytorch.tuner.lr_finder", "_LRFinder",
        "the class of the return value of Tuner.lr_find is private"),
    Row("lightning.pytorch.utilities.exceptions", "_TunerExitException",
        "Tuner expects this exception at the end of its search"),
    *(Row(_LR_FINDER, name, _SEARCHED) for name in (
        "_min_lr", "_max_lr", "_num_training_steps", "_mode", "_early_stop_threshold",
        "_update_attr", "_attr_name", "_early_exit",
    )),
    *(Row(_SIZE_FINDER, name, _SEARCHED) for name in (
        "_mode", "_steps_per_trial", "_init_val", "_max_trials", "_batch_arg_name",
        "_early_exit",
    )),
    Row(_SIZE_FINDER, "_margin", _SEARCHED, "2.6"),
    Row(_SIZE_FINDER, "_max_val", _SEARCHED, "2.6"),
    Row("lightning.pytorch.loops.fit_loop", "_FitLoop", _ORDER),
    Row("lightning.pytorch.loops.training_epoch_loop", "_TrainingEpochLoop", _ORDER),
    Row("lightning.pytorch.loops.evaluation_loop", "_EvaluationLoop", _ORDER),
    Row("lightning.fabric.utilities.device_dtype_mixin", "_update_properties",
        "self.device must be set also if no tensor needs to be moved"),
    Row("lightning.fabric.utilities.registry", "entry_points",
        "searching all installed packages takes half of the time to create a Trainer"),
    Row("lightning.pytorch.trainer.call", "_call_callback_hooks",
        "self.log in a callback needs the name of the current hook"),
    Row("lightning.pytorch.trainer.call", "_call_lightning_module_hook",
        "the end hooks of a batch that was fitted before the save are called on resume"),
    Row(f"{_CONNECTORS}.data_connector", "_DataLoaderSource", _FETCHED),
    Row(f"{_CONNECTORS}.data_connector", "_resolve_overfit_batches",
        "Lightning does not find shuffling samplers in wrapped loaders"),
    Row("lightning.pytorch.utilities.data", "_is_dataloader_shuffled", _SHARDED),
    Row(f"{_CONNECTORS}.signal_connector", "_HandlersCompose",
        "Lightning's handlers may be replaced, but the user's handlers may not"),
    Row(f"{_CONNECTORS}.signal_connector", "_SignalConnector",
        "Lightning's handlers may be replaced, but the user's handlers may not"),
    # The Trainer.
    Row(_TRAINER, "_signal_connector", _SIGNALS),
    Row(f"{_CONNECTORS}.signal_connector:_SignalConnector", "register_signal_handlers",
        _SIGNALS),
    Row(_TRAINER, "_checkpoint_connector", _LAST),
    Row(f"{_CONNECTORS}.checkpoint_connector:_CheckpointConnector", "_parse_ckpt_path", _LAST),
    Row("lightning.pytorch.callbacks.model_checkpoint:ModelCheckpoint",
        "_find_last_checkpoints", "no public method finds the last checkpoint"),
    Row("lightning.pytorch.callbacks.finetuning:BaseFinetuning.__init__", "_restarting",
        "the state from a checkpoint directory is loaded after the callback's on_fit_start"),
    Row("lightning.pytorch.callbacks.weight_averaging:WeightAveraging", "_swap_models",
        "a save in a validation must contain the weights, not their average", "2.6"),
    Row("lightning.pytorch.callbacks.weight_averaging:WeightAveraging.__init__",
        "_average_model", "a checkpoint directory must contain the average", "2.6"),
    Row("lightning.pytorch.callbacks.model_checkpoint:ModelCheckpoint",
        "_enable_version_counter", "a hook that is called on resume must overwrite its file"),
    Row("lightning.pytorch.callbacks.pruning:ModelPruning", "_original_layers", _PRUNED),
    Row("lightning.pytorch.callbacks.pruning:ModelPruning", "_parameters_to_prune", _PRUNED),
    Row("torchmetrics.wrappers.running:Running", "_num_vals_seen",
        "the state of SpikeDetection lacks the number of losses in its window"),
    Row(_TRAINER, "_data_connector", _SHARDED),
    Row(f"{_CONNECTORS}.data_connector:_DataConnector", "_prepare_dataloader", _SHARDED),
    Row(_TRAINER, "_accelerator_connector", _SAMPLER),
    Row(f"{_CONNECTORS}.accelerator_connector:_AcceleratorConnector",
        "use_distributed_sampler", _SAMPLER),
    Row(f"{_CONNECTORS}.accelerator_connector:_AcceleratorConnector.__init__",
        "cluster_environment", "the strategy for one device has no environment"),
    Row(_TRAINER, "_logger_connector", _LOGGED),
    Row(_LOGGER_CONNECTOR, "on_batch_start", _LOGGED),
    Row(_LOGGER_CONNECTOR, "on_batch_end", _LOGGED),
    Row(_LOGGER_CONNECTOR, "update_train_step_metrics", _LOGGED),
    Row(f"{_CONNECTORS}.logger_connector.logger_connector", "_LoggerConnector", _STEP),
    Row(_LOGGER_CONNECTOR, "callback_metrics", _STEP),
    Row(_LOGGER_CONNECTOR, "logged_metrics", _STEP),
    Row(_LOGGER_CONNECTOR, "should_update_logs", _STEP),
    Row(_LOGGER_CONNECTOR, "metrics", _STEP),
    Row(_LOGGER_CONNECTOR, "reset_results", _STEP),
    Row(f"{_LOGGER_CONNECTOR}.__init__", "_progress_bar_metrics", _STEP),
    Row(f"{_LOGGER_CONNECTOR}.__init__", "_callback_metrics", _STEP),
    Row(f"{_LOGGER_CONNECTOR}.__init__", "_logged_metrics", _STEP),
    Row(f"{_LOGGER_CONNECTOR}.__init__", "_first_loop_iter",
        "a validation in the middle of a batch must not change the batch's logged values"),
    Row(f"{_FIT}.setup_data", "val_check_batch", _EXHAUSTION),
    # The fit loop.
    Row(_FIT, "done", "the epoch counter advances after all hooks of the previous epoch"),
    Row(_FIT, "max_batches", _EXHAUSTION),
    Row(_FIT, "epoch_progress", "a Brain's checkpoint restores the number of epochs"),
    Row(_FIT, "_can_stop_early", "TRAIN must end in the batch in which a callback stops it"),
    Row(_FIT, "_warn_if_modules_in_eval_mode",
        "a Brain is in eval mode until its TRAIN stage starts", "2.5.5"),
    Row(_FIT, "_data_source", _FETCHED),
    Row(_FIT, "_combined_loader", "the loop would reuse the loaders of the previous run"),
    Row(_FIT, "_data_fetcher", _EXHAUSTION),
    Row(_FIT, "_last_train_dl_reload_epoch", _RELOADED),
    Row(_FIT, "on_advance_start", "the epoch number must be set before any hook is called"),
    Row(_FIT, "on_advance_end", "the epoch ends after the hooks of all callbacks"),
    # The epoch loop.
    Row(_EPOCH, "advance", _LEAN),
    Row(_EPOCH, "on_advance_end", "an epoch may resume with its validation"),
    Row(_EPOCH, "on_run_start", "an epoch may resume in its middle, after its start hook"),
    Row(_EPOCH, "batch_progress", "an epoch may resume in its middle"),
    Row(_EPOCH, "automatic_optimization", _STEPS),
    Row(_EPOCH, "manual_optimization", _STEPS),
    Row(_EPOCH, "_batches_that_stepped", "it is the step of loggers"),
    Row(_EPOCH, "_should_accumulate", "loggers count optimizer steps, which the Brain makes"),
    Row(_EPOCH, "_should_check_val_fx", "no public method tells whether a validation is due"),
    Row(_EPOCH, "_should_check_val_epoch",
        "an epoch without a batch has a validation, as in SpeechBrain"),
    Row(_EPOCH, "_broadcast_sigterm_tensor",
        "Lightning's SIGTERM handler of another rank waits for this collective", "2.5.2"),
    # The evaluation loops.
    Row(_EVALUATION, "run", "an overridden _fit_valid decides whether to validate"),
    Row(_EVALUATION, "on_run_start", "it is known only at this point which hooks are needed"),
    Row(_EVALUATION, "inference_mode", "tensors from an evaluation may be trained on later"),
    Row(_EVALUATION, "_evaluation_step", _LEAN),
    Row(_EVALUATION, "_last_val_dl_reload_epoch", _RELOADED),
    Row(_EVALUATION, "_has_run", "ModelCheckpoint reads it"),
    Row(_EVALUATION, "_data_source", _FETCHED),
    Row(_EVALUATION, "_combined_loader", _EXHAUSTION),
    Row(_EVALUATION, "_data_fetcher", _EXHAUSTION),
    Row(_EVALUATION, "_max_batches", _EXHAUSTION),
    Row(_COMBINED, "_iterator", "Lightning sets its limits before the stage starts"),
    Row(_COMBINED, "_mode", "the mode of a CombinedLoader has no public attribute"),
    Row("lightning.pytorch.utilities.combined_loader:_MaxSizeCycle", "_consumed",
        "a pass may resume after a shorter loader has restarted"),
    Row("lightning.pytorch.utilities.combined_loader", "_SUPPORTED_MODES",
        "the length of a CombinedLoader is known only after its iteration starts"),
    # Strategies.
    Row(_DDP, "_start_method", "with fork or spawn, a copy of the Brain would be trained"),
    Row(_DDP, "_ddp_kwargs", "each entry of modules is wrapped with these arguments"),
    Row(_DDP, "_process_group_backend",
        "run option distributed_backend applies to a strategy that already exists"),
    Row(_DDP, "_ddp_comm_hook", _WHOLE_MODULE),
    Row(_DDP, "_ddp_comm_state", _WHOLE_MODULE),
    Row(_DDP, "_ddp_comm_wrapper", _WHOLE_MODULE),
    Row(_DDP, "_model_averaging_period", _WHOLE_MODULE),
    # Loggers.
    Row(f"{_LOGGERS}.csv_logs:CSVLogger", "_version", _NUMBERED),
    Row(f"{_LOGGERS}.csv_logs:CSVLogger", "_experiment", _NUMBERED),
    Row(f"{_LOGGERS}.csv_logs:CSVLogger", "_prefix", _NAMES),
    Row(f"{_LOGGERS}.csv_logs:ExperimentWriter", "_check_log_dir_exists", _ROWS),
    Row(f"{_LOGGERS}.csv_logs:ExperimentWriter", "_rewrite_with_new_header", _ROWS),
    Row(f"{_LOGGERS}.tensorboard:TensorBoardLogger", "_version", _NUMBERED),
    Row(f"{_LOGGERS}.tensorboard:TensorBoardLogger", "_experiment", _NUMBERED),
    Row(f"{_LOGGERS}.wandb:WandbLogger", "_prefix", _NAMES),
    Row(f"{_LOGGERS}.mlflow:MLFlowLogger", "_prefix", _NAMES),
)

TORCH_PARTS = (
    Row("torch.nn.modules.batchnorm", "_BatchNorm", "it is the base class of every BatchNorm"),
    Row("torch.utils", "_pytree",
        "FSDP2 uses it to find tensors in the outputs of a module, e.g. of Hugging Face"),
    Row("torch:Tensor", "_version",
        "no public attribute tells whether a weight was changed in place"),
    Row("torch.nn:Module", "_apply",
        "modules that override it may move more than parameters and buffers"),
    Row("torch.nn.parallel:DistributedDataParallel.__init__", "_comm_hooks",
        "no public attribute tells whether a recipe registered a communication hook"),
    Row("torch:Tensor", "_backward_hooks",
        "no public attribute has the hooks that a trial registered on a weight"),
    Row("torch:Tensor", "_post_accumulate_grad_hooks",
        "no public attribute has the hooks that a trial registered on a weight"),
    Row("torch:Tensor", "_is_view",
        "an in-place change of a view replaces its hooks"),
    Row("torch.nn:MultiheadAttention", "_reset_parameters",
        "it initializes a module that was built on the meta device"),
    Row("torch.distributed.checkpoint.filesystem", "_StorageInfo",
        "pickled metadata of shards is loaded with an allow-list of names"),
    Row("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING",
        "pickled metadata of shards is loaded with an allow-list of names"),
    Row("torch.serialization", "_get_layout",
        "pickled metadata of shards is loaded with an allow-list of names"),
    Row("torch.nn:Module", "_forward_pre_hooks",
        "FSDP2's hooks must not run if a module calls itself in its forward pass"),
    Row("torch.nn:Module", "_forward_hooks",
        "FSDP2's hooks must not run if a module calls itself in its forward pass"),
    Row("torch.nn:Module", "_modules", "__getattr__ must not call itself"),
    Row("torch.nn:Module", "_non_persistent_buffers_set",
        "no public API tells which buffers a state dict leaves out"),
    Row(_PRUNE, "_orig", "a pruned checkpoint is loaded into a module without masks"),
    Row(_PRUNE, "_mask", "a pruned checkpoint is loaded into a module without masks"),
    Row("torch.nn:Module.state_dict", "_metadata",
        "the versions of modules are saved with their weights"),
    Row("torch.nn.parallel:DistributedDataParallel",
        "_set_params_and_buffers_to_ignore_for_model",
        "before an evaluation, DDPStrategy would overwrite buffers that differ between ranks"),
    Row("torch.optim.lr_scheduler:CyclicLR.state_dict", "_scale_fn_ref",
        "it refers to a method, which cannot be saved"),
    Row("torch.utils.data:DataLoader", "_iterator",
        "a copied loader must not share the workers of the original"),
    Row("torch.utils.data.dataloader:_BaseDataLoaderIter", "_num_yielded",
        "SpeechBrain's SaveableDataLoader saves it as the position"),
    Row("torch._dynamo.eval_frame:OptimizedModule", "_orig_mod",
        "names of weights must not change if a module is compiled"),
)
# fmt: on


def check_imports() -> None:
    """Raises if a private module or name that this package imports does not exist.

    Raises:
        UnsupportedError: If a name is missing.
    """
    _check([row for row in (*LIGHTNING_PARTS, *TORCH_PARTS) if ":" not in row.owner])


def check_contract() -> None:
    """Raises if a private name that this package uses does not exist.

    Raises:
        UnsupportedError: If a name is missing.
    """
    _check([*LIGHTNING_PARTS, *TORCH_PARTS])


def _check(rows: list[Row]) -> None:
    broken = [row for row in rows if not holds(row)]
    if broken:
        parts = "; ".join(
            f"{row.owner.replace(':', '.')}.{row.name} ({row.why})" for row in broken
        )
        raise UnsupportedError(
            f"Lightning {LIGHTNING} with torch {torch.__version__} lacks names that "
            f"brain_lightning needs: {parts}. brain_lightning is tested with Lightning "
            f'{TESTED_LIGHTNING}. Run pip install "lightning=={NEWEST_LIGHTNING}".'
        )


@cache
def holds(row: Row) -> bool:
    """Whether the installed versions have a private name.

    Args:
        row: The name.
    """
    if row.since > LIGHTNING:
        return True
    module, _, _ = row.owner.partition(":")
    # Importing the compiler takes seconds, and most runs do not need it.
    if module.startswith("torch._dynamo") and module not in sys.modules:
        return True
    try:
        owner = resolve_name(row.owner)
    except (AttributeError, ImportError):
        return False
    return hasattr(owner, row.name) or row.name in _names_in_code(owner)


def _names_in_code(owner: Any) -> set[Any]:
    """Returns the names in the code of a function, or of the constructors of a class."""
    functions = [vars(cls).get("__init__") for cls in getattr(owner, "__mro__", ())] or [owner]
    codes = [getattr(inspect.unwrap(each), "__code__", None) for each in functions if each]
    found = [(*code.co_names, *code.co_consts) for code in codes if code is not None]
    return {name for names in found for name in names}
