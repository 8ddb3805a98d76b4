"""What this package needs of Lightning and torch that they do not promise.

Each row says why nothing public serves. ``tests/lightning_internals/test_contract.py`` fails
where one does not hold on the installed versions, and where the package uses a private name
that has no row. A run on a release that moved one is refused before it trains.
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
    """One private part.

    Attributes:
        owner: A module, or ``module:class``, or ``module:class.function``.
        name: What the module or the class has, or ``__init__`` or the function sets.
        why: Why nothing public serves.
        since: The first Lightning that has it; the oldest that is tested is 2.4.
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

_ORDER = "no hook is at this point of SpeechBrain's order of events"
_FETCHED = "a batch is fetched when a Brain would, not when Lightning asks"
_EXHAUSTION = "a stage ends by exhaustion, never by a count"
_SHARDED = "Lightning shards the training data, and does not find the loaders behind ours"
_SIGNALS = "put back in on_train_start, handlers leave SIGTERM unhandled while processes wait"
_LAST = 'no hook is between fit(ckpt_path="last") and the choice of a file'
_LEAN = "the hooks that no callback has cost more than a small model"
_LOGGED = "what a callback logs with self.log is collected batch by batch"
_STEP = "numbers of a Brain that are logged by self.log cost more than a small model"
_STEPS = "global_step counts what optimizer_step counts"
_SAMPLER = "the Trainer's argument use_distributed_sampler cannot be read otherwise"
_RELOADED = "a resumed run makes its loaders again in the epochs in which it would have"
_NAMES = "what was logged is read back, and the prefix is part of its names"
_WHOLE_MODULE = "an argument for one DDP around the whole module cannot be read otherwise"
_ROWS = "a file of rows is deleted, or written anew, without a moment between for anybody"
_PRUNED = "ModelPruning does not save what its lottery ticket resets weights to"
_NUMBERED = "asking for the public property would choose a version and make its folder"

_SEARCHED = "a search is a trial of a Brain, and its callback does not show what it was given"
_LR_FINDER = "lightning.pytorch.callbacks.lr_finder:LearningRateFinder"
_SIZE_FINDER = "lightning.pytorch.callbacks.batch_size_finder:BatchSizeFinder"

# fmt: off
LIGHTNING_PARTS = (
    # What is imported.
    Row("lightning.pytorch.tuner.lr_finder", "_LRFinder",
        "what Tuner.lr_find returns has no public class"),
    Row("lightning.pytorch.utilities.exceptions", "_TunerExitException",
        "Tuner ends a fit that has found what it searched by it"),
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
        "a module knows its device once it is moved, also where all of it was there"),
    Row("lightning.fabric.utilities.registry", "entry_points",
        "all installed packages are looked through for each Trainer, in half of its time"),
    Row("lightning.pytorch.trainer.call", "_call_callback_hooks",
        "self.log in a callback has to know the hook that runs"),
    Row("lightning.pytorch.trainer.call", "_call_lightning_module_hook",
        "a batch that was fitted before a run was resumed is ended as every batch"),
    Row(f"{_CONNECTORS}.data_connector", "_DataLoaderSource", _FETCHED),
    Row(f"{_CONNECTORS}.data_connector", "_resolve_overfit_batches",
        "Lightning looks for shuffling samplers, which it does not find in our loaders"),
    Row("lightning.pytorch.utilities.data", "_is_dataloader_shuffled", _SHARDED),
    Row(f"{_CONNECTORS}.signal_connector", "_HandlersCompose",
        "a handler of Lightning's alone may be replaced, one of the user's may not"),
    Row(f"{_CONNECTORS}.signal_connector", "_SignalConnector",
        "a handler of Lightning's alone may be replaced, one of the user's may not"),
    # The Trainer.
    Row(_TRAINER, "_signal_connector", _SIGNALS),
    Row(f"{_CONNECTORS}.signal_connector:_SignalConnector", "register_signal_handlers",
        _SIGNALS),
    Row(_TRAINER, "_checkpoint_connector", _LAST),
    Row(f"{_CONNECTORS}.checkpoint_connector:_CheckpointConnector", "_parse_ckpt_path", _LAST),
    Row("lightning.pytorch.callbacks.model_checkpoint:ModelCheckpoint",
        "_find_last_checkpoints", "whether there is a last checkpoint is not said otherwise"),
    Row("lightning.pytorch.callbacks.finetuning:BaseFinetuning.__init__", "_restarting",
        "a state that comes from a directory is loaded when the callback has started"),
    Row("lightning.pytorch.callbacks.weight_averaging:WeightAveraging", "_swap_models",
        "a save in a validation has to hold the weights, not their average", "2.6"),
    Row("lightning.pytorch.callbacks.weight_averaging:WeightAveraging.__init__",
        "_average_model", "a checkpoint directory has to hold the average", "2.6"),
    Row("lightning.pytorch.callbacks.model_checkpoint:ModelCheckpoint",
        "_enable_version_counter", "a file of the moment that is made up for has its name"),
    Row("lightning.pytorch.callbacks.pruning:ModelPruning", "_original_layers", _PRUNED),
    Row("lightning.pytorch.callbacks.pruning:ModelPruning", "_parameters_to_prune", _PRUNED),
    Row("torchmetrics.wrappers.running:Running", "_num_vals_seen",
        "where the window of SpikeDetection begins is not in its state"),
    Row(_TRAINER, "_data_connector", _SHARDED),
    Row(f"{_CONNECTORS}.data_connector:_DataConnector", "_prepare_dataloader", _SHARDED),
    Row(_TRAINER, "_accelerator_connector", _SAMPLER),
    Row(f"{_CONNECTORS}.accelerator_connector:_AcceleratorConnector",
        "use_distributed_sampler", _SAMPLER),
    Row(f"{_CONNECTORS}.accelerator_connector:_AcceleratorConnector.__init__",
        "cluster_environment", "a Trainer of one device does not show its environment"),
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
        "a validation in the middle of a batch must not change what is logged of that"),
    Row(f"{_FIT}.setup_data", "val_check_batch", _EXHAUSTION),
    # The fit loop.
    Row(_FIT, "done", "the epoch counter is asked after every callback, before each epoch"),
    Row(_FIT, "max_batches", _EXHAUSTION),
    Row(_FIT, "epoch_progress", "a Brain's checkpoint brings the count of epochs"),
    Row(_FIT, "_can_stop_early", "TRAIN ends with the batch in which a callback stops it"),
    Row(_FIT, "_warn_if_modules_in_eval_mode",
        "a Brain is in eval mode until its TRAIN stage begins", "2.5.5"),
    Row(_FIT, "_data_source", _FETCHED),
    Row(_FIT, "_combined_loader", "the loop would reuse the loaders of a run that is over"),
    Row(_FIT, "_data_fetcher", _EXHAUSTION),
    Row(_FIT, "_last_train_dl_reload_epoch", _RELOADED),
    Row(_FIT, "on_advance_start", "an epoch is known before any hook hears of it"),
    Row(_FIT, "on_advance_end", "an epoch is over when every callback has heard of it"),
    # The epoch loop.
    Row(_EPOCH, "advance", _LEAN),
    Row(_EPOCH, "on_advance_end", "an epoch may resume with its validation"),
    Row(_EPOCH, "on_run_start", "an epoch may resume in its middle, after its start hook"),
    Row(_EPOCH, "batch_progress", "an epoch may resume in its middle"),
    Row(_EPOCH, "automatic_optimization", _STEPS),
    Row(_EPOCH, "manual_optimization", _STEPS),
    Row(_EPOCH, "_batches_that_stepped", "loggers count by it"),
    Row(_EPOCH, "_should_accumulate", "loggers count updates, which the Brain makes"),
    Row(_EPOCH, "_should_check_val_fx", "when a validation is due is not said otherwise"),
    Row(_EPOCH, "_should_check_val_epoch",
        "an epoch without a batch is validated, as SpeechBrain does"),
    Row(_EPOCH, "_broadcast_sigterm_tensor",
        "Lightning's handler of SIGTERM in another process waits for the answer", "2.5.2"),
    # The evaluation loops.
    Row(_EVALUATION, "run", "a recipe's own _fit_valid decides whether to validate"),
    Row(_EVALUATION, "on_run_start", "which hooks are needed is known when it begins"),
    Row(_EVALUATION, "inference_mode", "what an evaluation stores may be trained on later"),
    Row(_EVALUATION, "_evaluation_step", _LEAN),
    Row(_EVALUATION, "_last_val_dl_reload_epoch", _RELOADED),
    Row(_EVALUATION, "_has_run", "ModelCheckpoint asks for it"),
    Row(_EVALUATION, "_data_source", _FETCHED),
    Row(_EVALUATION, "_combined_loader", _EXHAUSTION),
    Row(_EVALUATION, "_data_fetcher", _EXHAUSTION),
    Row(_EVALUATION, "_max_batches", _EXHAUSTION),
    Row(_COMBINED, "_iterator", "its limits were set before the stage began"),
    Row(_COMBINED, "_mode", "how several loaders are combined is not said otherwise"),
    Row("lightning.pytorch.utilities.combined_loader:_MaxSizeCycle", "_consumed",
        "a pass may be resumed in which a shorter loader had begun again"),
    Row("lightning.pytorch.utilities.combined_loader", "_SUPPORTED_MODES",
        "the length of a CombinedLoader is known only once it is iterated"),
    # Strategies.
    Row(_DDP, "_start_method", "what a copy of the Brain in another process learns is lost"),
    Row(_DDP, "_ddp_kwargs", "each entry of modules is wrapped with the same arguments"),
    Row(_DDP, "_process_group_backend",
        "a user's strategy is made when the run option distributed_backend is read"),
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
    Row("torch.nn.modules.batchnorm", "_BatchNorm", "the base of every BatchNorm"),
    Row("torch.utils", "_pytree",
        "what FSDP2 finds in the outputs of a module, such as Hugging Face's, is found by it"),
    Row("torch:Tensor", "_version",
        "whether a weight was changed in place is not said otherwise"),
    Row("torch.nn:Module", "_apply",
        "what a module moves besides parameters and buffers is not known otherwise"),
    Row("torch.nn.parallel:DistributedDataParallel.__init__", "_comm_hooks",
        "whether a recipe has a hook that averages gradients is not said otherwise"),
    Row("torch:Tensor", "_backward_hooks",
        "which hooks a trial has registered on a weight is not said otherwise"),
    Row("torch:Tensor", "_post_accumulate_grad_hooks",
        "which hooks a trial has registered on a weight is not said otherwise"),
    Row("torch:Tensor", "_is_view",
        "a view that is changed in place has other hooks than it had"),
    Row("torch.nn:MultiheadAttention", "_reset_parameters",
        "a part that is built on the meta device is initialized by the name that it has"),
    Row("torch.distributed.checkpoint.filesystem", "_StorageInfo",
        "what is pickled of shards is loaded by an allow-list of names"),
    Row("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING",
        "what is pickled of shards is loaded by an allow-list of names"),
    Row("torch.serialization", "_get_layout",
        "what is pickled of shards is loaded by an allow-list of names"),
    Row("torch.nn:Module", "_forward_pre_hooks",
        "those of FSDP2 must not run in a call of a module within a call of it"),
    Row("torch.nn:Module", "_forward_hooks",
        "those of FSDP2 must not run in a call of a module within a call of it"),
    Row("torch.nn:Module", "_modules", "__getattr__ must not look for an attribute"),
    Row(_PRUNE, "_orig", "what a pruned module has saved is loaded by one that is not"),
    Row(_PRUNE, "_mask", "what a pruned module has saved is loaded by one that is not"),
    Row("torch.nn:Module.state_dict", "_metadata",
        "the versions of modules go along with their weights"),
    Row("torch.nn.parallel:DistributedDataParallel",
        "_set_params_and_buffers_to_ignore_for_model",
        "DDPStrategy would overwrite what is each process's own before an evaluation"),
    Row("torch.optim.lr_scheduler:CyclicLR.state_dict", "_scale_fn_ref",
        "it refers to a method, and cannot be saved"),
    Row("torch.utils.data:DataLoader", "_iterator",
        "a copy must not share the workers of the loader that it was made of"),
    Row("torch.utils.data.dataloader:_BaseDataLoaderIter", "_num_yielded",
        "SpeechBrain's SaveableDataLoader saves the position by it"),
    Row("torch._dynamo.eval_frame:OptimizedModule", "_orig_mod",
        "weights have the same names where nothing is compiled"),
)
# fmt: on


def check_imports() -> None:
    """Refuses a release without a module, or a name in one, that this package imports.

    Raises:
        UnsupportedError: There is one.
    """
    _check([row for row in (*LIGHTNING_PARTS, *TORCH_PARTS) if ":" not in row.owner])


def check_contract() -> None:
    """Refuses to run on a release in which a private part is no longer where it was.

    Raises:
        UnsupportedError: There is one.
    """
    _check([*LIGHTNING_PARTS, *TORCH_PARTS])


def _check(rows: list[Row]) -> None:
    broken = [row for row in rows if not holds(row)]
    if broken:
        parts = "; ".join(
            f"{row.owner.replace(':', '.')}.{row.name} ({row.why})" for row in broken
        )
        raise UnsupportedError(
            f"Lightning {LIGHTNING} with torch {torch.__version__} does not have what "
            f"brain_lightning needs: {parts}. It is tested with Lightning {TESTED_LIGHTNING}: "
            f'pip install "lightning=={NEWEST_LIGHTNING}"'
        )


@cache
def holds(row: Row) -> bool:
    """Whether a private part is where it was.

    Args:
        row: The part.
    """
    if row.since > LIGHTNING:
        return True
    module, _, _ = row.owner.partition(":")
    # To import the compiler takes seconds, and a run that does not compile has no need of it.
    if module.startswith("torch._dynamo") and module not in sys.modules:
        return True
    try:
        owner = resolve_name(row.owner)
    except (AttributeError, ImportError):
        return False
    return hasattr(owner, row.name) or row.name in _names_in_code(owner)


def _names_in_code(owner: Any) -> set[Any]:
    """The attributes that a function names, or the constructors of a class."""
    functions = [vars(cls).get("__init__") for cls in getattr(owner, "__mro__", ())] or [owner]
    codes = [getattr(inspect.unwrap(each), "__code__", None) for each in functions if each]
    found = [(*code.co_names, *code.co_consts) for code in codes if code is not None]
    return {name for names in found for name in names}
