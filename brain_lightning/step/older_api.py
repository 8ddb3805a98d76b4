"""Members of SpeechBrain 0.5's Brain that later versions of SpeechBrain removed.

The tutorial of the Brain class and many recipes use them. ``brain_lightning.Brain`` has all of
them. SpeechBrain's own Brain has them while it is patched and while it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from brain_lightning.compat import speechbrain
from brain_lightning.distributed.communication import on_all_ranks
from brain_lightning.fsdp2.evaluate import is_sharded
from brain_lightning.protocol import BrainProtocol
from brain_lightning.temporary import TemporaryAttributes

from .compile import compile_jit
from .update import clip_parameters, drop_nonfinite_gradients
from .valid_step import ValidStep


class Fallback:
    """An attribute with a computed value until the recipe assigns another value.

    Args:
        value: Computes the value from the Brain.
    """

    def __init__(self, value: Callable[[Any], Any]) -> None:
        self._value = value

    def __get__(self, brain: Any, owner: type | None = None) -> Any:
        return self if brain is None else self._value(brain)


class PrecisionFlag:
    """Whether training uses a precision, which a run option or a Trainer may have set.

    A ``fit_batch`` of a recipe may branch on it. SpeechBrain's ``__init__`` assigns the value
    of the deprecated run option with the same name. If that value is True, so is the flag.

    Args:
        precision: The precision.
    """

    def __init__(self, precision: str) -> None:
        self._precision = precision

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, brain: Any, owner: type | None = None) -> Any:
        if brain is None:
            return self
        return vars(brain).get(self._name) or brain.precision == self._precision

    def __set__(self, brain: Any, value: Any) -> None:
        vars(brain)[self._name] = value


def may_step(brain: BrainProtocol, loss: Tensor) -> bool:
    """Checks a loss and clips the gradients (``check_gradients(loss)`` of SpeechBrain 0.5).

    The parameters of all modules are clipped by one common norm.

    Args:
        brain: Brain in training.
        loss: Loss of the batch, with one element.

    Returns:
        Whether the optimizers should step. The result is the same on all ranks.
    """
    mine = isfinite(loss.item())
    if not on_all_ranks(mine, loss.device):
        brain.check_loss_isfinite(loss if not mine else loss * torch.nan)
        return False
    algorithm = brain._lightning.gradient_clip_algorithm
    clip_parameters(brain.modules.parameters(), brain.max_grad_norm, algorithm)
    return True


def check_gradients(brain: BrainProtocol, loss: Tensor | None = None) -> bool | None:
    """Implements ``check_gradients`` of SpeechBrain 1.0, or of 0.5 if ``loss`` is given.

    Args:
        brain: Brain in training.
        loss: See ``may_step``.

    Returns:
        None without a loss. With a loss, whether the optimizer should step.
    """
    if loss is not None:
        return may_step(brain, loss)
    drop_nonfinite_gradients(brain)
    return None


class OlderAPI:
    """Mixin with these members.

    Attributes:
        auto_mix_prec: Whether training uses fp16.
        bfloat16_mix_prec: Whether training uses bf16.
        use_amp: Whether training uses mixed precision.
        progressbar: Whether a progress bar is shown by default.
        valid_step: Number of training batches of this epoch with a finite loss.
    """

    auto_mix_prec = PrecisionFlag("fp16")
    bfloat16_mix_prec = PrecisionFlag("bf16")
    use_amp = Fallback(lambda brain: brain.precision != "fp32")
    progressbar = Fallback(lambda brain: not brain.noprogressbar)
    valid_step = ValidStep()

    def _compile_jit(self: Any) -> None:
        """Calls ``_compile``, and compiles ``jit_module_keys`` even if ``jit`` is not set."""
        self._compile()
        compile_jit(self)


def add_older_api(brain_class: Any, temporary: TemporaryAttributes) -> None:
    """Adds the removed members to SpeechBrain's Brain, and ``device`` to its Checkpointer.

    Args:
        brain_class: ``speechbrain.core.Brain``.
        temporary: Records the changes, to undo them after the run.
    """
    speechbrain.accept_devices(temporary)
    if hasattr(brain_class, "_compile_jit"):
        return
    for name, member in vars(OlderAPI).items():
        if not name.startswith("__"):
            temporary.override(brain_class, name, member)
    check, zero = brain_class.check_gradients, brain_class.zero_grad

    def check_gradients(self: Any, loss: Tensor | None = None) -> bool | None:
        if loss is None:
            # SpeechBrain's check looks only at the shard of each process.
            drop = drop_nonfinite_gradients if is_sharded(self.modules) else check
            return drop(self)
        # A custom loop in a recipe may call this outside of a run.
        speechbrain.add_attributes(self)
        return may_step(self, loss)

    def zero_grad(self: Any, set_to_none: bool = False) -> None:
        zero(self, set_to_none)
        if self.optimizers_dict is None and self.opt_class is None:
            zero_grad_of_optimizer(self, set_to_none)

    temporary.override(brain_class, "check_gradients", check_gradients)
    temporary.override(brain_class, "zero_grad", zero_grad)


def zero_grad_of_optimizer(brain: Any, set_to_none: bool) -> None:
    """Zeroes the gradients of ``brain.optimizer``, which an older ``init_optimizers`` created.

    Args:
        brain: Any Brain. Without this attribute nothing happens.
        set_to_none: Whether to set gradients to None instead.
    """
    if hasattr(brain, "optimizer"):
        brain.optimizer.zero_grad(set_to_none)


def support_older_api(brain: Any, temporary: TemporaryAttributes) -> None:
    """Makes SpeechBrain's objects accept calls in the style of 0.5 during a run.

    Args:
        brain: Brain that is going to run.
        temporary: Records the changes, to undo them after the run.
    """
    if speechbrain.is_speechbrains(brain):
        add_older_api(speechbrain.brain_class(), temporary)
    else:
        speechbrain.accept_devices(temporary)
