"""How one batch becomes one update: SpeechBrain's ``fit_batch`` and ``optimizers_step``.

``fit_batch`` takes an update, which computes and applies the gradients. ``RawUpdate`` calls
torch, as SpeechBrain does; ``module.automatic`` has one that goes through the Trainer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer

from brain_lightning.fsdp2.tensors import is_finite
from brain_lightning.optimizers.active import active_optimizers, has_optimizer
from brain_lightning.protocol import BrainProtocol, parameters_of

from .losses import TrainingLoss, training_loss
from .together import compute_alone, compute_together
from .valid_step import count_valid_step
from .window import add_to_window, end_window, is_full

logger = logging.getLogger(__name__)


def fit_batch(brain: BrainProtocol, batch: Any, update: RawUpdate) -> Tensor:
    """Fits one batch (``speechbrain.Brain.fit_batch``).

    A loss that is not finite leaves no gradients, and the update that it alone would have
    made is skipped; SpeechBrain would make every weight NaN.

    Args:
        brain: The Brain in training; its ``step`` counts this batch already.
        batch: What the loader gave.
        update: How gradients are computed and applied.

    Returns:
        The detached loss, on the CPU.
    """
    should_step = is_full(brain)
    compute = compute_together if brain._lightning.fails_together else compute_alone
    result = compute(brain, batch, update, should_step)
    if result.finite:
        count_valid_step(brain)
        add_to_window(brain, result.weight)
    if not result.finite and brain.grad_accumulation_factor == 1:
        should_step = False
    if should_step:
        update.step()
    update.end(batch, result, should_step)
    return result.on_host()


def optimizers_step(
    brain: BrainProtocol, apply: Callable[[Mapping[str, Optimizer]], None]
) -> None:
    """Steps the active optimizers once (``speechbrain.Brain.optimizers_step``).

    Args:
        brain: The Brain whose gradients are ready.
        apply: Clips the gradients of some optimizers and steps these.
    """
    if brain.optimizers_dict is None and brain.opt_class is None:
        return
    optimizers = active_optimizers(brain)
    end_window(brain, optimizers.values())
    for optimizer in optimizers.values():
        brain.scaler.unscale_(optimizer)
    apply(optimizers)
    brain.scaler.update()
    for optimizer in optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    brain.optimizer_step += 1


def prepare_gradients(brain: BrainProtocol, optimizers: Mapping[str, Optimizer]) -> None:
    """Clips the unscaled gradients and drops those that are not finite.

    Args:
        brain: Its ``max_grad_norm`` and ``skip_nonfinite_grads`` say how.
        optimizers: The optimizers about to step.
    """
    algorithm = brain._lightning.gradient_clip_algorithm
    clip_gradients(optimizers.values(), brain.max_grad_norm, algorithm)
    # A GradScaler that is on skips the whole step instead.
    if brain.skip_nonfinite_grads and not brain.scaler.is_enabled():
        brain.check_gradients()


def clip_gradients(
    optimizers: Iterable[Optimizer], max_norm: float, algorithm: str = "norm"
) -> None:
    """Clips the gradients of each optimizer on its own.

    One norm over everything could overflow (``speechbrain.Brain.optimizers_step``).
    SpeechBrain clips the first parameter group only and climbs the gradient
    where ``max_norm`` is negative; here all groups count, and 0 or less disables.

    Args:
        optimizers: The optimizers about to step.
        max_norm: The largest norm to allow.
        algorithm: ``"value"`` limits each number instead, as
            ``Trainer(gradient_clip_algorithm="value")``.
    """
    for optimizer in optimizers:
        clip_parameters(parameters_of(optimizer), max_norm, algorithm)


def clip_parameters(parameters: Iterable[Parameter], max_norm: float, algorithm: str) -> None:
    """Clips the gradients of parameters as one.

    Args:
        parameters: The parameters.
        max_norm: See ``clip_gradients``.
        algorithm: See ``clip_gradients``.
    """
    if max_norm > 0:
        clips: dict[str, Any] = {"norm": clip_grad_norm_, "value": clip_grad_value_}
        clips[algorithm](parameters, max_norm)


def drop_nonfinite_gradients(brain: BrainProtocol) -> None:
    """Drops each gradient that is not finite, and says whose it was.

    Of one in shards all processes drop theirs, or none does.

    Args:
        brain: The Brain, with gradients.
    """
    for name, parameter in brain.modules.named_parameters():
        if parameter.grad is not None and not is_finite(parameter.grad):
            parameter.grad = None
            logger.warning("Gradient of %s contains NaN or Inf: dropped.", name)


class RawUpdate:
    """An update by torch alone: for ``fit_batch`` called by a recipe, or without a Trainer.

    Args:
        brain: The Brain to update.

    Attributes:
        result: What the batch gave; None where that failed.
    """

    result: TrainingLoss | None = None

    def __init__(self, brain: BrainProtocol) -> None:
        self._brain = brain

    def compute_gradients(self, batch: Any) -> TrainingLoss:
        """Forward and backward pass of one batch."""
        result = training_loss(self._brain, batch)
        result.backward(result.scaled.backward)
        # Only now: an error frees what the batch holds.
        self.result = result
        return result

    def step(self) -> None:
        """One step, through the Brain's hook, which a recipe may override."""
        self._brain.optimizers_step()

    def end(self, batch: Any, result: TrainingLoss, should_step: bool) -> None:
        """``on_fit_batch_end``.

        Args:
            batch: What the loader gave.
            result: What it gave.
            should_step: Whether there was a step.
        """
        self._brain.on_fit_batch_end(batch, result.outputs, result.loss, should_step)

    def apply(self, optimizers: Mapping[str, Optimizer]) -> None:
        """Clips the gradients and steps each optimizer.

        Args:
            optimizers: The active optimizers by name.
        """
        prepare_gradients(self._brain, optimizers)
        for optimizer in optimizers.values():
            self._brain.scaler.step(optimizer)


class DirectUpdate(RawUpdate):
    """An update of a Brain that does not override stepping, by torch alone.

    Args:
        brain: The Brain to update.
        stepping: Called before optimizers step, with them.
        stepped: Called when the update is made, before ``on_fit_batch_end``, with the loss
            and with whether the batch counts as a step.
    """

    def __init__(
        self,
        brain: BrainProtocol,
        stepping: Callable[[Iterable[Optimizer]], None],
        stepped: Callable[[Tensor, bool], None],
    ) -> None:
        super().__init__(brain)
        self._stepping, self._stepped = stepping, stepped
        self._steps_before = brain.optimizer_step

    @property
    def is_step(self) -> bool:
        """Whether the batch counts as a step, as one does where nothing is optimized."""
        brain = self._brain
        # ModelCheckpoint counts steps.
        return brain.optimizer_step != self._steps_before or not has_optimizer(brain)

    def fit(self, batch: Any) -> Tensor:
        """``fit_batch`` of a Brain by this update.

        Args:
            batch: What the loader gave.
        """
        return fit_batch(self._brain, batch, self)

    def step(self) -> None:
        """One step, as a Brain of ours does it, also of one of SpeechBrain's."""
        optimizers_step(self._brain, self._step)

    def end(self, batch: Any, result: TrainingLoss, should_step: bool) -> None:
        """``on_fit_batch_end``, for which the batch is fitted."""
        self._stepped(result.loss, self.is_step)
        super().end(batch, result, should_step)

    def _step(self, optimizers: Mapping[str, Optimizer]) -> None:
        self._stepping(optimizers.values())
        self.apply(optimizers)
