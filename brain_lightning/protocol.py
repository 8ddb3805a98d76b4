"""The waist: all that the Trainer's side uses of a Brain.

``BrainProtocol`` has its attributes and methods, and the functions below look at a Brain
from outside. No folder but ``brain`` knows our own ``Brain`` class, so that a real
``speechbrain.Brain`` runs in the same way.
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
    """What every Trainer of a Brain class gets: see ``cli/script.py`` and ``patch.py``.

    Attributes:
        overrides: Arguments; they outrank the recipe's own.
        callbacks: Callbacks, in addition to the recipe's own.
    """

    overrides: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Sequence[Any] = ()


@dataclass
class LightningSettings:
    """What a Brain has beyond SpeechBrain's: every other name is the recipe's to take.

    Attributes:
        stage_type: The class of the stages that its hooks get.
        rank: The number of this process, from 0.
        world_size: The number of processes.
        explicit_options: The run options that somebody chose.
        trainer_arguments: A Trainer, or arguments for one, of the recipe.
        trainer_overrides: See ``TrainerDefaults``.
        trainer_callbacks: See ``TrainerDefaults``.
        gradient_clip_algorithm: How ``max_grad_norm`` clips; a Trainer may change it.
        ends_window: Whether the current batch ends an accumulation window early.
        counts_valid_steps: Whether ``valid_step`` is ours: see ``step/valid_step.py``.
        valid_step_was_read: Whether the recipe has read it.
        set_name: Of the set that is validated or tested, where there are several.
        trainer_of_parts: For all parts of fit that a script calls outside of any fit, so that
            limits count over them.
        ddp_arguments: Arguments of a Trainer's strategy for ``DistributedDataParallel``.
        flags: What all processes share of the batch in hand, while there is a run
            (``distributed.batch_flags.BatchFlags``).
        sharding: How a Trainer's strategy shards modules (``fsdp2.sharding.Sharding``); None
            for DistributedDataParallel.
        records: The best value of each number that its runs reported, and its last
            (``stages.metrics.Record``).
        progress: The run option.
        progress_interval: The run option.
        shard_eval: The run option.
        async_save: The run option.
        accumulate_by: The run option.
        window: The weights of a window that is not full (``step.window.Window``); None before
            there is one.
        preflight: The run option.
        learning_rate: What a search has found, for every optimizer that is made.
        oom_patience: The run option.
        fails_together: Whether all processes give up a batch for which one has no memory
            (``step/together.py``).
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
    fails_together: bool = False


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
# Of those, which take one of a few words.
WORDS = {"progress": PROGRESS_KINDS, "accumulate_by": ACCUMULATIONS}


def is_value_of(name: str, value: Any) -> bool:
    """Whether a value makes sense for one of ``OURS_ALONE``; a recipe may mean another thing.

    Args:
        name: The option.
        value: Any value.
    """
    if name in WORDS:
        return isinstance(value, str) and value in WORDS[name]
    if name == "progress_interval":
        return type(value) in (int, float) and value >= 0
    if name == "oom_patience":
        return value is None or (type(value) is int and value >= 0)
    return isinstance(value, bool)


class OptionValues(Protocol):
    """The run options that a Brain has as attributes; ``RunOptions`` says what each means.

    Those that SpeechBrain does not have are in ``LightningSettings``.
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
    """Attributes and methods of ``speechbrain.core.Brain`` that a Trainer run relies on."""

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


# A subclass that overrides one of these does its own stepping.
MANUAL_HOOKS = ("fit_batch", "optimizers_step")
# The parts of fit, and what each runs of a run.
PARTS = {"_fit_train": "train", "_fit_valid": "valid"}
# fit_batch calls these, and they have no default.
REQUIRED_HOOKS = ("compute_forward", "compute_objectives")


def overrides(brain_class: type, hook: str) -> bool:
    """Whether a subclass of Brain overrides a hook, or somebody has replaced Brain's own.

    Args:
        brain_class: The class of a Brain.
        hook: A method of Brain.
    """
    return _overrides(brain_class, hook, getattr(brain_class, hook, None))


# Asked in each batch; the method is there for those that are replaced.
@cache
def _overrides(brain_class: type, hook: str, _: Any) -> bool:
    # The class that first defines a hook is Brain itself, ours or SpeechBrain's.
    defining = [cls for cls in brain_class.__mro__ if hook in vars(cls)]
    if len(defining) != 1:
        return len(defining) > 1
    return not _is_original(vars(defining[0])[hook], defining[0], hook)


def _is_original(method: Any, brain_class: type, hook: str) -> bool:
    """Whether a method is the one that the class came with, or what we put in its place."""
    if isinstance(method, types.FunctionType) and method.__module__ == brain_class.__module__:
        # The class itself has decorators: torch.no_grad(), contextmanager.
        while method.__globals__["__name__"].startswith(("torch.", "contextlib")):
            method = method.__wrapped__  # type: ignore[attr-defined]
    if not isinstance(method, types.FunctionType) or method.__name__ != hook:
        return False
    module = str(method.__globals__["__name__"])
    return module == brain_class.__module__ or module.startswith("brain_lightning.")


def has_own(brain: BrainProtocol, hook: str) -> bool:
    """Whether a Brain overrides a hook, by its class or by an attribute.

    Args:
        brain: The Brain.
        hook: A method of Brain.
    """
    return hook in vars(brain) or overrides(type(brain), hook)


def steps_itself(brain: BrainProtocol) -> bool:
    """Whether a Brain steps its optimizers itself.

    Args:
        brain: The Brain.

    Returns:
        True where one of ``MANUAL_HOOKS`` is overridden.
    """
    return any(has_own(brain, hook) for hook in MANUAL_HOOKS)


def check_hooks(brain: BrainProtocol) -> None:
    """Refuses a Brain that lacks a hook.

    Args:
        brain: The Brain that is going to train, before a batch is loaded.

    Raises:
        BrainTypeError: A hook without default is not overridden.
    """
    brain_class = type(brain)
    if has_own(brain, "fit_batch") or has_own(brain, "_fit_train"):
        return
    for hook in REQUIRED_HOOKS:
        if not has_own(brain, hook):
            raise BrainTypeError(
                f"{brain_class.__name__} must define {hook}, or override fit_batch"
            )
    if overrides(brain_class, "check_gradients") and _needs_loss(brain_class):
        logger.warning(
            "%s.check_gradients(loss) is never called: fit_batch of SpeechBrain 0.5 did so, "
            "that of SpeechBrain 1 calls check_loss_isfinite, and optimizers_step clips",
            brain_class.__name__,
        )


def _needs_loss(brain_class: type[BrainProtocol]) -> bool:
    arguments = inspect.signature(brain_class.check_gradients).parameters.values()
    # Beside self.
    return (
        sum(a.default is a.empty and a.kind is a.POSITIONAL_OR_KEYWORD for a in arguments) > 1
    )


def check_fit(brain: BrainProtocol) -> None:
    """Refuses a Brain whose ``fit`` a Trainer would leave out.

    Args:
        brain: The Brain that is going to train.

    Raises:
        UnsupportedError: It overrides ``fit``.
    """
    if has_own(brain, "fit"):
        raise UnsupportedError(
            f"{type(brain).__name__} overrides fit, which trainer.fit(to_lightning(brain)) "
            "would leave out: call brain.fit(..., trainer=trainer), which runs the recipe's "
            "own fit on the Trainer, or move what it does to hooks"
        )


def hparam(brain: BrainProtocol, name: str, default: Any = None) -> Any:
    """One hyperparameter; a recipe may have replaced ``hparams`` by an object of any kind.

    Args:
        brain: The Brain.
        name: The hyperparameter.
        default: Its value where there is none.
    """
    return getattr(getattr(brain, "hparams", None), name, default)


def trainer_arguments(value: Any) -> Any:
    """What ``hparams["trainer"]`` gives to a Trainer.

    Args:
        value: A dict of its arguments, a Trainer, or what a recipe calls by that name.

    Returns:
        The dict or the Trainer; an empty dict where it is a value of the recipe's own.
    """
    if value is None or isinstance(value, Mapping) or _is_lightnings(value):
        return value or {}
    logger.warning(
        "hparams['trainer'] is %r, which gives no argument to a Trainer: it is the recipe's "
        "own. A Trainer gets its arguments by fit(..., trainer={...}) or --trainer.X=Y",
        value,
    )
    return {}


def _is_lightnings(value: object) -> bool:
    """Whether something is a Trainer, or a class or a function of Lightning's."""
    made_by = str(getattr(getattr(value, "func", value), "__module__", ""))
    return hasattr(value, "fit_loop") or made_by.startswith(
        ("lightning.", "pytorch_lightning")
    )


def hparams_of(brain: BrainProtocol) -> dict[str, Any]:
    """The hyperparameters by name; SpeechBrain's Brain may have none.

    Args:
        brain: The Brain.
    """
    return getattr(getattr(brain, "hparams", None), "__dict__", {})


# In one place; what there is more of is data, which would be looked through in each step.
_MOST_OPTIMIZERS = 100


def optimizers_of(brain: BrainProtocol) -> Iterator[tuple[str, Optimizer]]:
    """The optimizers that a Brain and its hparams have, with the expressions for them.

    Args:
        brain: The Brain, which may keep one in several places.
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
    """All parameters of an optimizer, over all its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def is_explicit(brain: object, option: str) -> bool:
    """Whether the user chose the value of a run option, rather than leave its default.

    Args:
        brain: The Brain.
        option: The run option.
    """
    settings: LightningSettings = brain._lightning  # type: ignore[attr-defined]
    return option in settings.explicit_options


def is_statistics(value: object, *methods: str) -> bool:
    """Whether an object collects statistics.

    Args:
        value: Any object.
        *methods: The interface: SpeechBrain's ``append`` and ``summarize``, or
            torchmetrics' ``update`` and ``compute``.
    """
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return False
    return all(callable(getattr(value, method, None)) for method in methods)
