"""Fits one batch: SpeechBrain's ``fit_batch`` and ``optimizers_step``.

``fit_batch`` gets an update object, which computes and applies the gradients. ``RawUpdate``
calls torch directly, as SpeechBrain does. ``module.automatic`` has an update that goes through
the Trainer.
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
from .synchronized import forward_backward, synchronized_forward_backward
from .valid_step import count_valid_step
from .window import add_to_window, end_window, is_full

logger = logging.getLogger(__name__)


def fit_batch(brain: BrainProtocol, batch: Any, update: RawUpdate) -> Tensor:
    """Fits one batch (``speechbrain.Brain.fit_batch``).

    A loss that is not finite leaves no gradients. If no other batch contributes to the
    optimizer step, the step is skipped. SpeechBrain would set every weight to NaN.

    Args:
        brain: Brain in training. Its ``step`` already counts this batch.
        batch: Batch as the DataLoader returned it.
        update: Computes and applies the gradients.

    Returns:
        The detached loss, on the CPU.
    """
    should_step = is_full(brain)
    synchronizes = brain._lightning.synchronizes_oom
    compute = synchronized_forward_backward if synchronizes else forward_backward
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
        brain: Brain whose gradients are complete.
        apply: Clips the gradients of the given optimizers and steps the optimizers.
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
    """Clips the unscaled gradients and drops gradients that are not finite.

    Args:
        brain: Brain with ``max_grad_norm`` and ``skip_nonfinite_grads``.
        optimizers: Optimizers that are about to step.
    """
    algorithm = brain._lightning.gradient_clip_algorithm
    clip_gradients(optimizers.values(), brain.max_grad_norm, algorithm)
    # An enabled GradScaler skips the whole step instead.
    if brain.skip_nonfinite_grads and not brain.scaler.is_enabled():
        brain.check_gradients()


def clip_gradients(
    optimizers: Iterable[Optimizer], max_norm: float, algorithm: str = "norm"
) -> None:
    """Clips the gradients of each optimizer separately (``optimizers_step``).

    One norm over all optimizers could overflow. SpeechBrain clips only the first parameter
    group, and a negative ``max_norm`` reverses the gradients. Here all groups are clipped,
    and a value of 0 or less disables clipping.

    Args:
        optimizers: Optimizers that are about to step.
        max_norm: Largest allowed norm.
        algorithm: ``"norm"``, or ``"value"`` to clip each element, as with
            ``Trainer(gradient_clip_algorithm="value")``.
    """
    for optimizer in optimizers:
        clip_parameters(parameters_of(optimizer), max_norm, algorithm)


def clip_parameters(parameters: Iterable[Parameter], max_norm: float, algorithm: str) -> None:
    """Clips the gradients of parameters by one common norm.

    Args:
        parameters: The parameters.
        max_norm: See ``clip_gradients``.
        algorithm: See ``clip_gradients``.
    """
    if max_norm > 0:
        clips: dict[str, Any] = {"norm": clip_grad_norm_, "value": clip_grad_value_}
        clips[algorithm](parameters, max_norm)


def drop_nonfinite_gradients(brain: BrainProtocol) -> None:
    """Drops each gradient that is not finite and logs the name of its parameter.

    For a sharded gradient, either all ranks drop their shards or none does.

    Args:
        brain: Brain whose gradients are complete.
    """
    for name, parameter in brain.modules.named_parameters():
        if parameter.grad is not None and not is_finite(parameter.grad):
            parameter.grad = None
            logger.warning(
                "The gradient of %s has NaN or infinite values and is dropped.", name
            )


class RawUpdate:
    """An update that calls torch directly, without a Trainer.

    It is used if a recipe calls ``fit_batch``, or if there is no Trainer.

    Args:
        brain: Brain to update.

    Attributes:
        result: Loss of the batch, or None if the batch failed.
    """

    result: TrainingLoss | None = None

    def __init__(self, brain: BrainProtocol) -> None:
        self._brain = brain

    def compute_gradients(self, batch: Any) -> TrainingLoss:
        """Runs the forward and backward pass of one batch."""
        result = training_loss(self._brain, batch)
        result.backward(result.scaled.backward)
        # Assigned last: after an error, nothing here holds the memory of the batch.
        self.result = result
        return result

    def step(self) -> None:
        """Steps through ``brain.optimizers_step``, which a recipe may override."""
        self._brain.optimizers_step()

    def end(self, batch: Any, result: TrainingLoss, should_step: bool) -> None:
        """Calls ``on_fit_batch_end``.

        Args:
            batch: Batch as the DataLoader returned it.
            result: Loss of the batch.
            should_step: Whether an optimizer step was due.
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
    """An update without the Trainer, for a Brain that does not override ``optimizers_step``.

    Args:
        brain: Brain to update.
        stepping: Called with the optimizers before they step.
        stepped: Called after the step and before ``on_fit_batch_end``, with the loss and with
            whether the batch counts as a step.
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
        """Whether the batch counts as a step. If nothing is optimized, every batch counts."""
        brain = self._brain
        # ModelCheckpoint counts these steps.
        return brain.optimizer_step != self._steps_before or not has_optimizer(brain)

    def fit(self, batch: Any) -> Tensor:
        """Calls ``fit_batch`` with this update.

        Args:
            batch: Batch as the DataLoader returned it.
        """
        return fit_batch(self._brain, batch, self)

    def step(self) -> None:
        """Steps as ``brain_lightning.Brain`` does, also for a Brain of SpeechBrain."""
        optimizers_step(self._brain, self._step)

    def end(self, batch: Any, result: TrainingLoss, should_step: bool) -> None:
        """Calls ``on_fit_batch_end``. Before it, the batch counts as fitted."""
        self._stepped(result.loss, self.is_step)
        super().end(batch, result, should_step)

    def _step(self, optimizers: Mapping[str, Optimizer]) -> None:
        self._stepping(optimizers.values())
        self.apply(optimizers)
