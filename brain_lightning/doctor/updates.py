"""Checks custom training steps, and uses of the API of SpeechBrain 0.5."""

from __future__ import annotations

from collections.abc import Iterator

from brain_lightning.protocol import MANUAL_HOOKS

from .method import Location
from .modules import SPEECHBRAIN
from .remark import Remark, remark
from .source import BrainSource

# Trainer arguments that Brain's training step applies.
STEP_ARGUMENTS = (
    "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision",
)  # fmt: skip
# Attributes that SpeechBrain's Brain does not have since version 1.0, and how to show them.
OLD_API = {
    "_compile_jit": "self._compile_jit()",
    "use_amp": "self.use_amp",
    "valid_step": "self.valid_step",
}


def update_remarks(brain: BrainSource) -> Iterator[Remark]:
    """Checks which Trainer arguments a custom training step applies.

    Args:
        brain: The Brain.

    Yields:
        Remarks.
    """
    if steps_itself(brain):
        yield from _fit_batch_remarks(brain)
    elif brain.is_replaced("optimizers_step"):
        yield from _clip_remarks(brain)
        yield from _scaler_remarks(brain)
    elif "optimizers_step" in brain.chains and brain.base == SPEECHBRAIN:
        yield _value_not_supported(brain)
    if not steps_itself(brain):
        yield from _beside_the_step(brain)
    if brain.is_replaced("evaluate_batch") and "evaluation_ctx" not in brain.reads:
        says = "Validation stays in fp32. Compute it within self.evaluation_ctx."
        yield remark("precision", says, brain.methods["evaluate_batch"])


def _beside_the_step(brain: BrainSource) -> Iterator[Remark]:
    """Checks updates and autocasts outside of Brain's ``fit_batch``."""
    if at := _update_outside_the_step(brain):
        says = (
            "This backward() or step() is outside of Brain's training step. It runs in every "
            "batch regardless of accumulate_grad_batches, without clipping or a scaler."
        )
        yield remark("fit_batch", says, at, *STEP_ARGUMENTS)
    autocasts = [at for method in brain.learning for at in method.calls.get("autocast", [])]
    if autocasts and not {"precision", "auto_mix_prec"} & _known(brain):
        says = (
            "The recipe's autocast takes precedence over this argument. Remove the autocast."
        )
        yield remark("precision", says, min(autocasts))


def _update_outside_the_step(brain: BrainSource) -> Location | None:
    """Returns the first ``backward()`` or ``step()`` outside of Brain's training step."""
    own = brain.reached_from(["optimizers_step"])
    methods = [*brain.learning, *brain.every(brain.reached_from(["on_fit_batch_end"]))]
    found = [
        at for method in methods if method.name not in own
        for at in (*method.calls.get("backward", []), *method.optimizer_steps)
    ]  # fmt: skip
    return min(found, default=None)


def steps_itself(brain: BrainSource) -> bool:
    """Returns whether a Brain's ``fit_batch`` has a custom training step.

    Args:
        brain: The Brain.

    Returns:
        True if ``fit_batch`` is overridden, and calls ``backward()`` or does not call
        ``super()``.
    """
    learns = any("backward" in method.calls for method in brain.every(["fit_batch"]))
    return "fit_batch" in brain.chains and (brain.is_replaced("fit_batch") or learns)


def old_api_remarks(brain: BrainSource) -> Iterator[Remark]:
    """Checks uses of SpeechBrain 0.5's API, which ``brain_lightning.Brain`` still supports.

    Args:
        brain: The Brain.

    Yields:
        Remarks, which exclude no argument and no strategy.
    """
    given = [at for m in brain.every() for at in m.given.get("check_gradients", [])]
    if _calls_old_check_gradients(brain):
        says = (
            "check_gradients(loss) works on a Trainer as in SpeechBrain 0.5. On SpeechBrain's "
            "own loop it raises a TypeError since version 1.0."
        )
        yield Remark("check_gradients", says, given[0].line, given[0].file)
    assigned = {name for method in brain.every() for name in method.sets}
    for name, text in OLD_API.items():
        if name in brain.reads and name not in assigned | brain.chains.keys():
            at = brain.reads[name][0]
            says = f"{text} works on a Trainer. SpeechBrain's loop lacks it since version 1.0."
            yield Remark(name, says, at.line, at.file)


def _calls_old_check_gradients(brain: BrainSource) -> bool:
    given = any("check_gradients" in method.given for method in brain.every())
    return given and "check_gradients" not in brain.chains


def _manual_hook(brain: BrainSource) -> str:
    return next(hook for hook in MANUAL_HOOKS if hook in brain.chains)


def _value_not_supported(brain: BrainSource) -> Remark:
    says = "'value' is not supported. SpeechBrain's training step clips only by norm."
    return remark("gradient_clip_algorithm", says, brain.methods[_manual_hook(brain)])


def _clip_remarks(brain: BrainSource) -> Iterator[Remark]:
    at = brain.methods[_manual_hook(brain)]
    steps = _steps_by_brains(brain)
    if brain.base == SPEECHBRAIN:
        yield _value_not_supported(brain)
    elif not steps:
        says = "It has no effect. Call self.optimizers_step() to step."
        yield remark("gradient_clip_algorithm", says, at)
    # check_gradients(loss) of SpeechBrain 0.5 clips. check_gradients() of 1.0 does not.
    checks = _calls_old_check_gradients(brain)
    if not steps and not checks and "max_grad_norm" not in _known(brain):
        says = "It has no effect. Clip to self.max_grad_norm, or call self.optimizers_step()."
        yield remark("gradient_clip_val", says, at)


def _steps_by_brains(brain: BrainSource) -> bool:
    """Returns whether a Brain steps by calling Brain's ``optimizers_step``."""
    called = "optimizers_step" in _known(brain)
    return called and not brain.is_replaced("optimizers_step")


def _known(brain: BrainSource) -> set[str]:
    """Returns the attributes of the Brain that it reads while it learns from a batch."""
    return {name for method in brain.learning for name in method.reads}


def _fit_batch_remarks(brain: BrainSource) -> Iterator[Remark]:
    yield from _clip_remarks(brain)
    at = brain.methods["fit_batch"]
    says = "An incomplete last accumulation window makes no update, as in SpeechBrain."
    if "grad_accumulation_factor" not in _known(brain):
        says = "It has no effect. Step if self.step % self.grad_accumulation_factor == 0."
    yield remark("accumulate_grad_batches", says, at)
    says = _precision_says(brain)
    if says:
        yield remark("precision", says, at)
    else:
        yield from _scaler_remarks(brain)


def _precision_says(brain: BrainSource) -> str:
    """Returns the problem of a fit_batch in mixed precision, or empty if it has none."""
    known = _known(brain)
    autocasts = any("autocast" in method.calls for method in brain.learning)
    if "training_ctx" in known or ("precision" in known and autocasts):
        return ""
    if {"auto_mix_prec", "bfloat16_mix_prec"} <= known and autocasts:
        return ""
    if "auto_mix_prec" in known and autocasts:
        return (
            "bf16-mixed has no effect, because self.auto_mix_prec is true for 16-mixed only. "
            "Compute the loss within self.training_ctx."
        )
    if autocasts:
        return (
            "The recipe's autocast takes precedence over this argument. Compute the loss "
            "within self.training_ctx instead."
        )
    return "Mixed precision has no effect. Compute the loss within self.training_ctx."


def _scaler_remarks(brain: BrainSource) -> Iterator[Remark]:
    if "scaler" not in _known(brain):
        says = "With 16-mixed, small gradients become zero. Scale the loss by self.scaler."
        yield remark("precision", says, brain.methods[_manual_hook(brain)])
