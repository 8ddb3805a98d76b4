"""The LightningModule that is generated for a Brain subclass: what happens with one batch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn import ModuleDict
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import _loops
from .agreement import check_backbone
from .callback import BrainCallback
from .compile import without_compiled_prefix
from .epochs import Epochs
from .errors import BrainTypeError, UnsupportedError
from .optimizers import OptimizerGroup
from .protocol import BrainProtocol
from .stage import Stage
from .stages import Stages
from .update import TrainingLoss, fit_batch, optimizers_step, prepare_gradients, training_loss

# A subclass that overrides one of these does its own stepping.
MANUAL_HOOKS = ("fit_batch", "optimizers_step")
# What fit_batch calls, and has no default.
REQUIRED_HOOKS = ("compute_forward", "compute_objectives")


class BrainModule(LightningModule):
    """What both ways of stepping share: evaluation, stages and housekeeping.

    Args:
        brain: The Brain to run.
        epoch_counter: Its epochs; ``hparams.epoch_counter`` if not given, and
            where there is none 1, 2, … until the Trainer stops.
        progressbar: Whether to show SpeechBrain's bar where the Trainer has none.
        max_key: For ``on_evaluate_start``.
        min_key: For ``on_evaluate_start``.
    """

    def __init__(
        self,
        brain: BrainProtocol,
        *,
        epoch_counter: Iterable[Any] | None = None,
        progressbar: bool = False,
        max_key: str | None = None,
        min_key: str | None = None,
    ) -> None:
        super().__init__()
        self.brain = brain
        self.brain_modules = brain.modules
        self.stages = Stages(brain, Epochs(()))
        self._epoch_counter = epoch_counter
        self._explicit_weights: dict[str, Tensor] | None = None
        self._run_options: dict[str, Any] = {
            "progressbar": progressbar,
            "max_key": max_key,
            "min_key": min_key,
        }

    def configure_callbacks(self) -> list[Callback]:
        """Begins a run: new stages over the same Brain, and the callback that runs them."""
        if self.trainer.state.fn is TrainerFn.FITTING:
            _refuse_unfinished(self.brain)
        counter = self._epoch_counter
        if counter is None:
            hparams = getattr(self.brain, "hparams", None)
            counter = getattr(hparams, "epoch_counter", None) or itertools.count(1)
        self.stages = Stages(self.brain, Epochs(counter), **self._run_options)
        return [BrainCallback(self.stages, self.trainer)]

    def __deepcopy__(self, memo: dict[int, Any]) -> BrainModule:
        """Copies the weights, for callbacks that average them, and shares everything else."""
        brain = copy.copy(self.brain)
        brain.modules = copy.deepcopy(self.brain.modules, memo)
        return type(self)(brain, epoch_counter=self._epoch_counter, **self._run_options)

    def __getattr__(self, name: str) -> Any:
        """Finds an entry of the Brain's modules: BackboneFinetuning wants ``backbone``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self._modules.get("brain_modules")
            if isinstance(modules, ModuleDict) and name in modules:
                return modules[name]
            raise

    def setup(self, stage: str) -> None:
        """Refuses what would go wrong silently."""
        if self.trainer.world_size > 1:
            raise UnsupportedError(
                f"training on {self.trainer.world_size} processes is not supported yet: "
                "use Trainer(devices=1)"
            )

    def configure_optimizers(self) -> Optimizer:
        """``on_fit_start`` of the Brain: compile, init_optimizers, recover.

        Lightning calls this once the modules are on their device and the
        process group is up.
        """
        self.brain.on_fit_start()
        group = OptimizerGroup(self.brain)
        check_backbone(self.trainer, self.brain, group)
        return group

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Weights by the names that they have where nothing is compiled."""
        state = super().state_dict(*args, **kwargs)
        return {without_compiled_prefix(name): value for name, value in state.items()}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Takes what ``state_dict`` gave, whether or not the modules are compiled by now."""
        names = {without_compiled_prefix(name): name for name in super().state_dict()}
        renamed = {names.get(name, name): value for name, value in state_dict.items()}
        return super().load_state_dict(renamed, strict, assign)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the weights of an explicit ``ckpt_path``: they win over the best ones."""
        if self._trainer is not None and self._trainer.training:
            raise UnsupportedError(
                "fit(ckpt_path=...) cannot resume a Brain yet: the epoch counter and the "
                "position in the data are not in a Lightning checkpoint. Give the Brain a "
                "checkpointer, or take the weights alone with "
                "load_from_checkpoint(path, brain=brain)"
            )
        self._explicit_weights = checkpoint["state_dict"]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Draws the next batch, as late as SpeechBrain does; without one TRAIN ends.

        The last hook of a batch: every callback has seen it before.
        """
        self._log_running_loss(batch_idx)
        last = _loops.is_cut_short(self.trainer) or not self.stages.train_loader.advance()
        _loops.mark_last_batch(self.trainer, last)
        if last:
            self.stages.end_train()

    def on_validation_model_eval(self) -> None:
        """Begins the VALID stage: the hook first, then ``eval()``."""
        self.stages.start_valid()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """``evaluate_batch`` at Stage.VALID."""
        return self.stages.evaluate(batch, Stage.VALID)

    def on_validation_epoch_end(self) -> None:
        """Ends the VALID stage, before callbacks look at what it changed."""
        self.stages.end_valid()
        self._log_metrics()

    def on_test_model_eval(self) -> None:
        """Begins an evaluation: the best or an explicit checkpoint, then the TEST stage."""
        self.stages.recover_best()
        if self._explicit_weights is not None:
            self.load_state_dict(self._explicit_weights)
            self._explicit_weights = None
        self.stages.start_test()

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """``evaluate_batch`` at Stage.TEST."""
        return self.stages.evaluate(batch, Stage.TEST)

    def on_test_epoch_end(self) -> None:
        """Ends the TEST stage."""
        self.stages.end_test()
        self._log_metrics()

    def on_train_epoch_end(self) -> None:
        """Hands over what no validation has, before callbacks that monitor look."""
        self._log_metrics()

    def _log_running_loss(self, batch_idx: int) -> None:
        # Not self.log, which costs more than the whole loop where it runs at every step.
        trainer = self.trainer
        # An attribute that Lightning's type hints do not show.
        if trainer.loggers and not (batch_idx + 1) % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            for logger in trainer.loggers:
                running = {"train_loss_step": self.brain.avg_train_loss}
                logger.log_metrics(running, trainer.global_step)

    def _log_metrics(self) -> None:
        metrics = self.stages.metrics.take()
        if not self.trainer.barebones:
            self.log_dict(metrics, batch_size=1)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """``compute_forward`` at Stage.TEST, in evaluation precision."""
        with self.brain.evaluation_ctx:
            return self.brain.compute_forward(batch, stage=Stage.TEST)

    def on_predict_model_eval(self) -> None:
        """Puts the modules in eval mode, as every evaluation of a Brain."""
        self.brain.modules.eval()

    def _believes_last(self, batch_idx: int) -> bool:
        return batch_idx + 1 >= self.trainer.num_training_batches

    def on_validation_model_train(self) -> None:
        """Nothing: a Brain stays in eval mode until its next TRAIN stage."""

    def on_test_model_train(self) -> None:
        """Nothing: a Brain stays in eval mode after an evaluation."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: a Brain zeroes its gradients itself, but not those of frozen optimizers."""

    def cpu(self) -> BrainModule:
        """Nothing: a Brain stays on its device after a run."""
        return self

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Moves a batch to the device; on the CPU every batch is there."""
        if device.type == "cpu":
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


class AutomaticModule(BrainModule):
    """For a Brain that leaves the stepping alone: Lightning's automatic optimization."""

    def __init__(self, brain: BrainProtocol, **kwargs: Any) -> None:
        super().__init__(brain, **kwargs)
        self._batch: Any = None
        self._training_loss: TrainingLoss | None = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Keeps the batch, for Lightning hands only a closure to ``optimizer_step``."""
        self._batch = batch

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """``fit_batch`` of SpeechBrain, with Lightning doing the passes and the step."""
        brain, before = self.brain, self.brain.optimizer_step
        assert isinstance(optimizer, LightningOptimizer)
        assert optimizer_closure is not None
        update = _TrainerUpdate(self, optimizer, optimizer_closure)
        self.stages.fit(
            lambda batch: fit_batch(brain, batch, update),
            self._batch,
            last=self._believes_last(batch_idx),
        )
        self._batch = None
        if brain.optimizer_step == before:
            _loops.discount_step(self.trainer)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """``compute_forward`` and ``compute_objectives`` at Stage.TRAIN."""
        self._training_loss = training_loss(self.brain, batch)
        return self._training_loss.scaled

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The backward pass, but for a loss that is not finite."""
        if self._training_loss is not None and self._training_loss.finite:
            super().backward(loss, *args, **kwargs)

    def take_training_loss(self) -> TrainingLoss:
        """What ``training_step`` found; the module does not keep it, nor its graph."""
        result, self._training_loss = self._training_loss, None
        assert result is not None
        return result

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as the Brain does: each active optimizer on its own."""
        assert isinstance(optimizer, OptimizerGroup)
        prepare_gradients(self.brain, optimizer.active)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Nothing: the Brain zeroes what has stepped."""


class _TrainerUpdate:
    """An update that goes through the Trainer: its strategy, precision and callbacks."""

    def __init__(
        self,
        module: AutomaticModule,
        optimizer: LightningOptimizer,
        closure: Callable[[], Any],
    ) -> None:
        self._module = module
        self._optimizer = optimizer
        self._closure = closure

    def compute_gradients(self, batch: Any) -> TrainingLoss:
        """Lightning's closure: ``training_step``, then the backward pass."""
        self._closure()
        return self._module.take_training_loss()

    def step(self) -> None:
        """One step of the group, in Lightning's order of hooks."""
        optimizers_step(self._module.brain, self._apply)

    def _apply(self, optimizers: Mapping[str, Optimizer]) -> None:
        group = self._optimizer.optimizer
        assert isinstance(group, OptimizerGroup)
        group.active = optimizers
        self._optimizer.step(closure=_no_closure)


def _no_closure() -> bool:
    # Not None: Lightning's mixed precision takes that for "skip this step".
    return True


class ManualModule(BrainModule):
    """For a Brain with its own ``fit_batch`` or ``optimizers_step``: it runs as it is."""

    def __init__(self, brain: BrainProtocol, **kwargs: Any) -> None:
        super().__init__(brain, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """``fit_batch`` of the Brain; each optimizer step in it moves ``global_step``."""
        with _counted_steps() as steps:
            last = self._believes_last(batch_idx)
            loss = self.stages.fit(self.brain.fit_batch, batch, last)
        _loops.count_steps(self.trainer, len(steps))
        # A recipe may return anything; callbacks understand a tensor.
        return loss if isinstance(loss, Tensor) else None


@contextmanager
def _counted_steps() -> Iterator[list[Optimizer]]:
    """Gathers the optimizers that step within, whoever owns them."""
    stepped: list[Optimizer] = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: stepped.append(optimizer))
    try:
        yield stepped
    finally:
        handle.remove()


@cache
def lightning_module_class(brain_class: type) -> type[BrainModule]:
    """Generates the LightningModule class for a Brain class.

    Args:
        brain_class: A subclass of ``Brain``.

    Returns:
        A class named after it, ``ASRModule`` for ``ASR``: automatic
        optimization unless ``fit_batch`` or ``optimizers_step`` is overridden.

    Raises:
        TypeError: ``brain_class`` is no Brain class.
    """
    missing = [hook for hook in MANUAL_HOOKS if not hasattr(brain_class, hook)]
    if missing:
        raise TypeError(f"{brain_class!r} is no Brain class: it has no {missing[0]}")
    base = ManualModule if _steps_itself(brain_class) else AutomaticModule
    return type(
        f"{brain_class.__name__}Module",
        (base,),
        {
            "__module__": brain_class.__module__,
            "__doc__": base.__doc__,
            "__init__": _constructor(base, brain_class),
        },
    )


def _constructor(base: type[BrainModule], brain_class: type) -> Callable[..., None]:
    """The constructor of ``base``, with the type that LightningCLI is to build a Brain of."""

    def __init__(self: BrainModule, brain: Any, **kwargs: Any) -> None:  # noqa: N807
        base.__init__(self, brain, **kwargs)

    __init__.__annotations__["brain"] = brain_class
    return __init__


def _steps_itself(brain_class: type) -> bool:
    return any(_overrides(brain_class, hook) for hook in MANUAL_HOOKS)


def _overrides(brain_class: type, hook: str) -> bool:
    # The class that first defines a hook is Brain itself, ours or SpeechBrain's.
    return sum(hook in vars(cls) for cls in brain_class.__mro__) > 1


def _refuse_unfinished(brain: BrainProtocol) -> None:
    """A missing hook is told before the first batch is loaded."""
    brain_class = type(brain)
    for hook in () if _overrides(brain_class, "fit_batch") else REQUIRED_HOOKS:
        if not _overrides(brain_class, hook) and hook not in vars(brain):
            raise BrainTypeError(
                f"{brain_class.__name__} must define {hook}, or override fit_batch"
            )


def to_lightning(brain: BrainProtocol, **kwargs: Any) -> BrainModule:
    """Turns a Brain into a LightningModule, for a Trainer of one's own.

    Args:
        brain: The Brain; its modules are shared, not copied.
        **kwargs: See ``BrainModule``.

    Returns:
        ``trainer.fit(to_lightning(brain), train_loader, valid_loader)`` gives the
        Brain the same weights as ``brain.fit`` with the same loaders.
    """
    return lightning_module_class(type(brain))(brain, **kwargs)
