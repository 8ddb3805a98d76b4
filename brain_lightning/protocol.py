"""The waist: what the Trainer's side uses of a Brain, and nothing more.

Nothing above this line of the architecture needs our own ``Brain`` class, so
a real ``speechbrain.Brain`` can go through the same engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import GradScaler, Tensor
from torch.nn import ModuleDict
from torch.optim import Optimizer


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
    def _fit_valid(self, valid_set: Any, epoch: Any, enable: bool) -> None: ...
    def _should_save_intra_epoch_ckpt(
        self, last_ckpt_time: float, steps_since_ckpt: int
    ) -> bool: ...
    def _save_intra_epoch_ckpt(self) -> None: ...
    def no_sync(self, use: bool = True) -> AbstractContextManager[None]: ...
