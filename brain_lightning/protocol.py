"""The interface between a Brain and the Trainer's side ("the waist").

``BrainProtocol`` has the attributes and methods of a Brain that the Trainer's side uses. The
functions below inspect a Brain from outside. Only the folder ``brain`` knows the class
``brain_lightning.Brain``, so that a ``speechbrain.Brain`` runs in the same way.
"""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

from torch import GradScaler, Tensor
from torch.nn import ModuleDict, Parameter
from torch.optim import Optimizer

from .errors import BrainTypeError, UnsupportedError

logger = logging.getLogger(__name__)


@dataclass
class TrainerDefaults:
    """Defaults for every Trainer of a Brain class: see ``cli/script.py`` and ``patch.py``.

    Attributes:
        overrides: Trainer arguments. They take precedence over the recipe's arguments.
        callbacks: Callbacks in addition to the recipe's callbacks.
    """

    overrides: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Sequence[Any] = ()


@dataclass
class LightningSettings:
    """Everything that brain_lightning adds to a Brain. All other names belong to the recipe.

    Attributes:
        stage_type: Class of the stages that the hooks get.
        rank: Rank of this process.
        world_size: Number of processes.
        explicit_options: Names of the run options that the user set.
        trainer_arguments: The recipe's Trainer, or its arguments for one.
        trainer_overrides: See ``TrainerDefaults``.
        trainer_callbacks: See ``TrainerDefaults``.
        gradient_clip_algorithm: How ``max_grad_norm`` clips. A Trainer may change it.
        ends_window: Whether the current batch ends an accumulation window early.
        counts_valid_steps: Whether ``valid_step`` is counted: see ``step/valid_step.py``.
        valid_step_was_read: Whether the recipe has read ``valid_step``.
        set_name: Name of the set that is validated or tested, if there are several.
        trainer_of_parts: Trainer of all ``_fit_train`` and ``_fit_valid`` that a script calls
            outside of a fit. Limits count over all these calls.
        ddp_arguments: Arguments of a Trainer's strategy for ``DistributedDataParallel``.
        flags: Flags of the current batch that all ranks share during a run
            (``distributed.batch_flags.BatchFlags``).
        sharding: How the Trainer's strategy shards modules (``fsdp2.sharding.Sharding``), or
            None for DistributedDataParallel.
        records: Best and last value of each number that the Brain's runs reported
            (``stages.metrics.Record``).
        progress: The run option.
        progress_interval: The run option.
        shard_eval: The run option.
        async_save: The run option.
        accumulate_by: The run option.
        window: Weights of the current accumulation window (``step.window.Window``), or None
            before the first one.
        preflight: The run option.
        learning_rate: Result of a search, for every optimizer that is created later.
        oom_patience: The run option.
        synchronizes_oom: Whether all ranks skip a batch if one rank is out of memory
            (``step/synchronized.py``).
    """

    stage_type: Any
    rank: int = 0
    world_size: int = 1
    explicit_options: frozenset[str] = frozenset()
    trainer_arguments: Any = field(default_factory=dict)
    trainer_overrides: Mapping[str, Any] = field(default_factory=dict)
    trainer_callbacks: Sequence[Any] = ()
    gradient_clip_algorithm: str = "norm"
    ends_window: bool = False
    counts_valid_steps: bool = True
    valid_step_was_read: bool = False
    set_name: str = ""
    trainer_of_parts: Any = None
    ddp_arguments: Mapping[str, Any] = field(default_factory=dict)
    flags: Any = None
    sharding: Any = None
    records: dict[str, Any] = field(default_factory=dict)
    progress: str = "auto"
    progress_interval: float = 10
    shard_eval: bool = False
    async_save: bool = False
    accumulate_by: str = "batches"
    window: Any = None
    preflight: bool = False
    learning_rate: float | None = None
    oom_patience: int | None = None
    synchronizes_oom: bool = False


# Run options that SpeechBrain's own Brain does not have.
OURS_ALONE = (
    "accumulate_by",
    "async_save",
    "oom_patience",
    "preflight",
    "progress",
    "progress_interval",
    "shard_eval",
)
PROGRESS_KINDS = ("auto", "bar", "plain")
ACCUMULATIONS = ("batches", "tokens")
# Allowed values of the options among them that accept a fixed set of values.
OPTION_CHOICES = {"progress": PROGRESS_KINDS, "accumulate_by": ACCUMULATIONS}


def is_value_of(name: str, value: Any) -> bool:
    """Returns whether a value is valid for one of ``OURS_ALONE``.

    If it is not, a recipe may use the name for a hyperparameter.

    Args:
        name: Name of the option.
        value: Any value.
    """
    if name in OPTION_CHOICES:
        return isinstance(value, str) and value in OPTION_CHOICES[name]
    if name == "progress_interval":
        return type(value) in (int, float) and value >= 0
    if name == "oom_patience":
        return value is None or (type(value) is int and value >= 0)
    return isinstance(value, bool)


class OptionValues(Protocol):
    """The run options that a Brain has as attributes. ``RunOptions`` describes them.

    Options that SpeechBrain does not have are in ``LightningSettings``.
    """

    test_only: bool
    debug: bool
    debug_batches: int
    debug_epochs: int
    debug_persistently: bool
    device: str
    distributed_backend: str
    distributed_launch: bool
    find_unused_parameters: bool
    jit: bool
    jit_module_keys: list[str] | None
    compile: bool
    compile_module_keys: list[str] | None
    compile_mode: str
    compile_using_fullgraph: bool
    compile_using_dynamic_shape_tracing: bool
    precision: str
    eval_precision: str
    max_grad_norm: float
    skip_nonfinite_grads: bool
    nonfinite_patience: int
    noprogressbar: bool
    ckpt_interval_minutes: float
    ckpt_interval_steps: int
    grad_accumulation_factor: int
    optimizer_step_limit: int | None
    tqdm_colored_bar: bool
    tqdm_barcolor: dict[str, str]
    remove_vector_weight_decay: bool
    profile_training: bool
    profile_warmup: int
    profile_steps: int


class BrainProtocol(OptionValues, Protocol):
    """The attributes and methods of ``speechbrain.core.Brain`` that a Trainer run uses."""

    _lightning: LightningSettings

    modules: ModuleDict
    opt_class: Any
    checkpointer: Any
    device_type: str
    scaler: GradScaler
    optimizers_dict: dict[str, Optimizer] | None
    train_sampler: Any

    step: int
    valid_step: int
    optimizer_step: int
    avg_train_loss: float
    nonfinite_count: int
    training_ctx: Any
    evaluation_ctx: Any

    @property
    def _optimizer_step_limit_exceeded(self) -> bool: ...
    def compute_forward(self, batch: Any, stage: Any) -> Any: ...
    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any: ...
    def on_fit_start(self) -> None: ...
    def init_optimizers(self) -> None: ...
    def on_stage_start(self, stage: Any, epoch: Any = None) -> None: ...
    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None: ...
    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None: ...
    def on_fit_batch_end(
        self, batch: Any, outputs: Any, loss: Any, should_step: bool
    ) -> None: ...
    def on_evaluate_start(
        self, max_key: str | None = None, min_key: str | None = None
    ) -> None: ...
    def make_dataloader(self, dataset: Any, stage: Any, **loader_kwargs: Any) -> Any: ...
    def fit_batch(self, batch: Any) -> Any: ...
    def evaluate_batch(self, batch: Any, stage: Any) -> Any: ...
    def optimizers_step(self) -> None: ...
    def freeze_optimizers(
        self, optimizers: dict[str, Optimizer]
    ) -> Mapping[str, Optimizer]: ...
    def zero_grad(self, set_to_none: bool = False) -> None: ...
    def check_loss_isfinite(self, loss: Tensor) -> None: ...
    def check_gradients(self, loss: Tensor | None = None) -> bool | None: ...
    def update_average(self, loss: Any, avg_loss: float) -> float: ...
    def _fit_train(self, train_set: Any, epoch: Any, enable: bool) -> None: ...
    def _fit_valid(self, valid_set: Any, epoch: Any, enable: bool) -> None: ...
    def _should_save_intra_epoch_ckpt(
        self, last_ckpt_time: float, steps_since_ckpt: int
    ) -> bool: ...
    def _save_intra_epoch_ckpt(self) -> None: ...
    def no_sync(self, use: bool = True) -> AbstractContextManager[None]: ...


# A subclass that overrides one of these controls its optimizer steps itself.
MANUAL_HOOKS = ("fit_batch", "optimizers_step")
# The methods that are parts of ``fit``, and the stage of a run that each runs.
PARTS = {"_fit_train": "train", "_fit_valid": "valid"}
# Hooks that fit_batch calls and that have no default.
REQUIRED_HOOKS = ("compute_forward", "compute_objectives")


def overrides(brain_class: type, hook: str) -> bool:
    """Returns whether a subclass overrides a hook, or Brain's own hook was replaced.

    Args:
        brain_class: Class of a Brain.
        hook: Name of a method of Brain.
    """
    return _overrides(brain_class, hook, getattr(brain_class, hook, None))


# Cached, because it is called in each batch. The method is a key of the cache, because it may
# be replaced.
@cache
def _overrides(brain_class: type, hook: str, _: Any) -> bool:
    # The class that first defines a hook is Brain: brain_lightning's or SpeechBrain's.
    defining = [cls for cls in brain_class.__mro__ if hook in vars(cls)]
    if len(defining) != 1:
        return len(defining) > 1
    return not _is_original(vars(defining[0])[hook], defining[0], hook)


def _is_original(method: Any, brain_class: type, hook: str) -> bool:
    """Returns whether a method is the class's original, or brain_lightning's replacement."""
    if isinstance(method, types.FunctionType) and method.__module__ == brain_class.__module__:
        # Skip the decorators of the class itself: torch.no_grad() and contextmanager.
        while method.__globals__["__name__"].startswith(("torch.", "contextlib")):
            method = method.__wrapped__  # type: ignore[attr-defined]
    if not isinstance(method, types.FunctionType) or method.__name__ != hook:
        return False
    module = str(method.__globals__["__name__"])
    return module == brain_class.__module__ or module.startswith("brain_lightning.")


def has_own(brain: BrainProtocol, hook: str) -> bool:
    """Returns whether a Brain overrides a hook, in its class or by an attribute.

    Args:
        brain: The Brain.
        hook: Name of a method of Brain.
    """
    return hook in vars(brain) or overrides(type(brain), hook)


def steps_itself(brain: BrainProtocol) -> bool:
    """Returns whether a Brain controls its optimizer steps itself.

    Args:
        brain: The Brain.

    Returns:
        True if one of ``MANUAL_HOOKS`` is overridden.
    """
    return any(has_own(brain, hook) for hook in MANUAL_HOOKS)


def check_hooks(brain: BrainProtocol) -> None:
    """Raises an error if a Brain lacks a required hook.

    Args:
        brain: Brain that is going to train. No batch is loaded yet.

    Raises:
        BrainTypeError: A hook without a default is not overridden.
    """
    brain_class = type(brain)
    if has_own(brain, "fit_batch") or has_own(brain, "_fit_train"):
        return
    for hook in REQUIRED_HOOKS:
        if not has_own(brain, hook):
            raise BrainTypeError(
                f"{brain_class.__name__} must define {hook} or override fit_batch."
            )
    if overrides(brain_class, "check_gradients") and _needs_loss(brain_class):
        logger.warning(
            "%s.check_gradients(loss) is never called. SpeechBrain 0.5 calls it in fit_batch. "
            "SpeechBrain 1 calls check_loss_isfinite instead, and optimizers_step clips.",
            brain_class.__name__,
        )


def _needs_loss(brain_class: type[BrainProtocol]) -> bool:
    arguments = inspect.signature(brain_class.check_gradients).parameters.values()
    # More than one, because ``self`` is counted, too.
    return (
        sum(a.default is a.empty and a.kind is a.POSITIONAL_OR_KEYWORD for a in arguments) > 1
    )


def check_fit(brain: BrainProtocol) -> None:
    """Raises an error if a Brain overrides ``fit``, which ``trainer.fit`` does not call.

    Args:
        brain: Brain that is going to train.

    Raises:
        UnsupportedError: The Brain overrides ``fit``.
    """
    if has_own(brain, "fit"):
        raise UnsupportedError(
            f"{type(brain).__name__} overrides fit, but trainer.fit(to_lightning(brain)) does "
            "not call it. Call brain.fit(..., trainer=trainer), which runs this fit on the "
            "Trainer, or move its code to hooks."
        )


def hparam(brain: BrainProtocol, name: str, default: Any = None) -> Any:
    """Returns a hyperparameter. A recipe may have replaced ``hparams`` by any object.

    Args:
        brain: The Brain.
        name: Name of the hyperparameter.
        default: Value if the hyperparameter does not exist.
    """
    return getattr(getattr(brain, "hparams", None), name, default)


def trainer_arguments(value: Any) -> Any:
    """Returns the Trainer, or the arguments for one, in ``hparams["trainer"]``.

    Args:
        value: A dict of arguments, a Trainer, or any other value.

    Returns:
        The dict or the Trainer. An empty dict if the value is a recipe's hyperparameter.
    """
    if value is None or isinstance(value, Mapping) or _is_lightnings(value):
        return value or {}
    logger.warning(
        "hparams['trainer']=%r is not a Trainer and not a dict of its arguments. It is taken "
        "for a hyperparameter of the recipe. Use fit(..., trainer={...}) or --trainer.X=Y.",
        value,
    )
    return {}


def _is_lightnings(value: object) -> bool:
    """Returns whether a value is a Trainer, or a class or function of Lightning."""
    made_by = str(getattr(getattr(value, "func", value), "__module__", ""))
    return hasattr(value, "fit_loop") or made_by.startswith(
        ("lightning.", "pytorch_lightning")
    )


def hparams_of(brain: BrainProtocol) -> dict[str, Any]:
    """Returns the hyperparameters by name. A Brain of SpeechBrain may have none.

    Args:
        brain: The Brain.
    """
    return getattr(getattr(brain, "hparams", None), "__dict__", {})


# Larger collections are data. They are not searched, because this is called in each step.
_MOST_OPTIMIZERS = 100


def optimizers_of(brain: BrainProtocol) -> Iterator[tuple[str, Optimizer]]:
    """Yields the optimizers of a Brain and its hparams, with the expressions for them.

    Args:
        brain: The Brain. One optimizer may be yielded several times.
    """
    for owner, values in {"self": vars(brain), "hparams": hparams_of(brain)}.items():
        for name, value in values.items():
            if isinstance(value, Optimizer):
                yield f"{owner}.{name}", value
            elif isinstance(value, (dict, list, tuple)) and len(value) <= _MOST_OPTIMIZERS:
                items = value.items() if isinstance(value, dict) else enumerate(value)
                for key, each in items:
                    if isinstance(each, Optimizer):
                        yield f"{owner}.{name}[{key!r}]", each


def parameters_of(optimizer: Optimizer) -> list[Parameter]:
    """Returns all parameters of an optimizer, over all its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def is_explicit(brain: object, option: str) -> bool:
    """Returns whether the user set a run option, as opposed to using its default.

    Args:
        brain: The Brain.
        option: Name of the run option.
    """
    settings: LightningSettings = brain._lightning  # type: ignore[attr-defined]
    return option in settings.explicit_options


def is_statistics(value: object, *methods: str) -> bool:
    """Returns whether an object collects statistics.

    Args:
        value: Any object.
        *methods: Methods of the interface: ``append`` and ``summarize`` (SpeechBrain), or
            ``update`` and ``compute`` (torchmetrics).
    """
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return False
    return all(callable(getattr(value, method, None)) for method in methods)
