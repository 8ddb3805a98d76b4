"""Members of SpeechBrain 0.5's Brain that SpeechBrain has dropped since.

The tutorial of the Brain class, and many recipes, are written in them. Our Brain has them
all, and SpeechBrain's own while it is patched, and while it runs.
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
    """An attribute that has a value until the recipe gives it another.

    Args:
        value: Its value for a Brain.
    """

    def __init__(self, value: Callable[[Any], Any]) -> None:
        self._value = value

    def __get__(self, brain: Any, owner: type | None = None) -> Any:
        return self if brain is None else self._value(brain)


class PrecisionFlag:
    """Whether a precision is in force, whoever chose it: a run option or a Trainer.

    A recipe's own ``fit_batch`` branches on it. SpeechBrain's ``__init__`` assigns the run
    option of the same name, which says so as well where it is set.

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

    All modules' parameters are clipped as one.

    Args:
        brain: The Brain in training.
        loss: The loss of its batch, one number.

    Returns:
        Whether the optimizers should step; the same answer in every process.
    """
    mine = isfinite(loss.item())
    if not on_all_ranks(mine, loss.device):
        brain.check_loss_isfinite(loss if not mine else loss * torch.nan)
        return False
    algorithm = brain._lightning.gradient_clip_algorithm
    clip_parameters(brain.modules.parameters(), brain.max_grad_norm, algorithm)
    return True


def check_gradients(brain: BrainProtocol, loss: Tensor | None = None) -> bool | None:
    """``speechbrain.Brain.check_gradients``, of SpeechBrain 1.0 or with a loss of 0.5.

    Args:
        brain: The Brain in training.
        loss: See ``may_step``.

    Returns:
        None; with a loss whether the optimizer may step.
    """
    if loss is not None:
        return may_step(brain, loss)
    drop_nonfinite_gradients(brain)
    return None


class OlderAPI:
    """The members, for a Brain to inherit.

    Attributes:
        auto_mix_prec: Whether training is in fp16.
        bfloat16_mix_prec: Whether training is in bf16.
        use_amp: Whether training is in mixed precision.
        progressbar: Whether a bar is shown by default.
        valid_step: Training batches of this epoch whose loss was finite.
    """

    auto_mix_prec = PrecisionFlag("fp16")
    bfloat16_mix_prec = PrecisionFlag("bf16")
    use_amp = Fallback(lambda brain: brain.precision != "fp32")
    progressbar = Fallback(lambda brain: not brain.noprogressbar)
    valid_step = ValidStep()

    def _compile_jit(self: Any) -> None:
        """``_compile``; and ``jit_module_keys`` alone, without ``jit``, are compiled too."""
        self._compile()
        compile_jit(self)


def add_older_api(brain_class: Any, temporary: TemporaryAttributes) -> None:
    """Gives SpeechBrain's Brain what it has dropped, and its Checkpointer a ``device``.

    Args:
        brain_class: ``speechbrain.core.Brain``.
        temporary: Records what is changed.
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
            # SpeechBrain's asks each process about its own shard.
            drop = drop_nonfinite_gradients if is_sharded(self.modules) else check
            return drop(self)
        # There is no run where a recipe has a loop of its own.
        speechbrain.add_attributes(self)
        return may_step(self, loss)

    def zero_grad(self: Any, set_to_none: bool = False) -> None:
        zero(self, set_to_none)
        if self.optimizers_dict is None and self.opt_class is None:
            zero_grad_of_optimizer(self, set_to_none)

    temporary.override(brain_class, "check_gradients", check_gradients)
    temporary.override(brain_class, "zero_grad", zero_grad)


def zero_grad_of_optimizer(brain: Any, set_to_none: bool) -> None:
    """Zeroes the gradients of ``brain.optimizer``, which an older ``init_optimizers`` made.

    Args:
        brain: Any Brain; nothing happens where there is no optimizer.
        set_to_none: Frees them instead.
    """
    if hasattr(brain, "optimizer"):
        brain.optimizer.zero_grad(set_to_none)


def support_older_api(brain: Any, temporary: TemporaryAttributes) -> None:
    """Lets SpeechBrain's objects be called as in 0.5 for the time of a run.

    Args:
        brain: The Brain that is going to run.
        temporary: Records what is changed.
    """
    if speechbrain.is_speechbrains(brain):
        add_older_api(speechbrain.brain_class(), temporary)
    else:
        speechbrain.accept_devices(temporary)
