"""The waist: all that the Trainer's side uses of a Brain.

``BrainProtocol`` has its attributes and methods, and the functions below look at a Brain
from outside. No folder but ``brain`` knows our own ``Brain`` class, so that a real
``speechbrain.Brain`` runs in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import GradScaler, Tensor
from torch.nn import ModuleDict
from torch.optim import Optimizer

from .errors import BrainTypeError, UnsupportedError


class OptionValues(Protocol):
    """The run options that a Brain has as attributes; ``RunOptions`` says what each means."""

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
    progress: str
    progress_interval: float
    ckpt_interval_minutes: float
    ckpt_interval_steps: int
    shard_eval: bool
    async_save: bool
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

    stage_type: Any
    trainer_arguments: Any
    trainer_overrides: Mapping[str, Any]
    trainer_callbacks: Sequence[Any]

    modules: ModuleDict
    opt_class: Any
    checkpointer: Any
    device_type: str
    scaler: GradScaler
    optimizers_dict: dict[str, Optimizer] | None
    train_sampler: Any
    rank: int
    world_size: int
    gradient_clip_algorithm: str

    step: int
    optimizer_step: int
    avg_train_loss: float
    nonfinite_count: int
    ends_window: bool
    training_ctx: Any
    evaluation_ctx: Any

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
    def check_gradients(self) -> None: ...
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
    """Whether a subclass of Brain overrides a hook.

    Args:
        brain_class: The class of a Brain.
        hook: A method of Brain.
    """
    # The class that first defines a hook is Brain itself, ours or SpeechBrain's.
    return sum(hook in vars(cls) for cls in brain_class.__mro__) > 1


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
    own_steps = has_own(brain, "fit_batch") or has_own(brain, "_fit_train")
    for hook in () if own_steps else REQUIRED_HOOKS:
        if not has_own(brain, hook):
            raise BrainTypeError(
                f"{brain_class.__name__} must define {hook}, or override fit_batch"
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


def hparams_of(brain: BrainProtocol) -> dict[str, Any]:
    """The hyperparameters by name; SpeechBrain's Brain may have none.

    Args:
        brain: The Brain.
    """
    return getattr(getattr(brain, "hparams", None), "__dict__", {})


def is_explicit(brain: object, option: str) -> bool:
    """Whether the user chose the value of a run option, rather than leave its default.

    Args:
        brain: The Brain.
        option: The run option.
    """
    return option in getattr(brain, "explicit_options", ())


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
