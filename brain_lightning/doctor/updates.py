"""What a recipe's own step leaves to itself, and what it has of SpeechBrain 0.5."""

from __future__ import annotations

from collections.abc import Iterator

from brain_lightning.protocol import MANUAL_HOOKS

from .method import Location
from .modules import SPEECHBRAINS
from .remark import Remark, remark
from .source import BrainSource

# What Brain's own step does for its optimizers.
OF_STEPS = (
    "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision",
)  # fmt: skip
# What Brain has no longer since SpeechBrain 1.0, and what SpeechBrain's own loop says to it.
OF_OLD = {
    "_compile_jit": "self._compile_jit()",
    "use_amp": "self.use_amp",
    "valid_step": "self.valid_step",
}


def update_remarks(brain: BrainSource) -> Iterator[Remark]:
    """Options that a recipe's own step has to apply itself.

    Args:
        brain: The Brain.

    Yields:
        Remarks.
    """
    if steps_itself(brain):
        yield from _fit_batch_remarks(brain)
    elif brain.is_own("optimizers_step"):
        yield from _clip_remarks(brain)
        yield from _scaler_remarks(brain)
    elif "optimizers_step" in brain.chains and brain.base == SPEECHBRAINS:
        yield _algorithm_is_refused(brain)
    if not steps_itself(brain):
        yield from _beside_the_step(brain)
    if brain.is_own("evaluate_batch") and "evaluation_ctx" not in brain.reads:
        says = "validation stays fp32: compute it within self.evaluation_ctx"
        yield remark("precision", says, brain.methods["evaluate_batch"])


def _beside_the_step(brain: BrainSource) -> Iterator[Remark]:
    """What a recipe does beside Brain's own ``fit_batch``, where nothing of it reaches."""
    if at := _update_beside_the_step(brain):
        says = (
            "this backward() or step() is beside Brain's own step: it is made in each batch "
            "whatever accumulate_grad_batches is, is not clipped, and has no scaler"
        )
        yield remark("fit_batch", says, at, *OF_STEPS)
    autocasts = [at for method in brain.learning for at in method.calls.get("autocast", [])]
    if autocasts and not {"precision", "auto_mix_prec"} & _known(brain):
        says = "the recipe's own autocast decides within it, not this: leave it out"
        yield remark("precision", says, min(autocasts))


def _update_beside_the_step(brain: BrainSource) -> Location | None:
    """Where gradients are made or applied first, the methods of Brain's own step apart."""
    own = brain.reached_from(["optimizers_step"])
    methods = [*brain.learning, *brain.every(brain.reached_from(["on_fit_batch_end"]))]
    found = [
        at for method in methods if method.name not in own
        for at in (*method.calls.get("backward", []), *method.optimizer_steps)
    ]  # fmt: skip
    return min(found, default=None)


def steps_itself(brain: BrainSource) -> bool:
    """Whether a Brain's ``fit_batch`` learns from a batch without Brain's own.

    Args:
        brain: The Brain.

    Returns:
        True where it is overridden, and calls no ``super()`` or also ``backward()``.
    """
    learns = any("backward" in method.calls for method in brain.every(["fit_batch"]))
    return "fit_batch" in brain.chains and (brain.is_own("fit_batch") or learns)


def old_api_remarks(brain: BrainSource) -> Iterator[Remark]:
    """What a recipe has of SpeechBrain 0.5, which works here and no longer there.

    Args:
        brain: The Brain.

    Yields:
        Remarks, which limit nothing.
    """
    given = [at for m in brain.every() for at in m.given.get("check_gradients", [])]
    if _checks_gradients_as_of_old(brain):
        says = (
            "check_gradients(loss) works here as in SpeechBrain 0.5; on SpeechBrain's own "
            "Brain it is a TypeError since 1.0"
        )
        yield Remark("check_gradients", says, given[0].line, given[0].file)
    assigned = {name for method in brain.every() for name in method.sets}
    for name, text in OF_OLD.items():
        if name in brain.reads and name not in assigned | brain.chains.keys():
            at = brain.reads[name][0]
            says = f"{text} works here; SpeechBrain's own Brain has none since 1.0"
            yield Remark(name, says, at.line, at.file)


def _checks_gradients_as_of_old(brain: BrainSource) -> bool:
    given = any("check_gradients" in method.given for method in brain.every())
    return given and "check_gradients" not in brain.chains


def _line(brain: BrainSource) -> str:
    return next(hook for hook in MANUAL_HOOKS if hook in brain.chains)


def _algorithm_is_refused(brain: BrainSource) -> Remark:
    says = "'value' is refused: SpeechBrain's own steps clip norms alone"
    return remark("gradient_clip_algorithm", says, brain.methods[_line(brain)])


def _clip_remarks(brain: BrainSource) -> Iterator[Remark]:
    at = brain.methods[_line(brain)]
    steps = _steps_by_brains(brain)
    if brain.base == SPEECHBRAINS:
        yield _algorithm_is_refused(brain)
    elif not steps:
        says = "has no effect: step by self.optimizers_step()"
        yield remark("gradient_clip_algorithm", says, at)
    # SpeechBrain 0.5's check_gradients(loss) clips; 1.0's takes no argument, and does not.
    checks = _checks_gradients_as_of_old(brain)
    if not steps and not checks and "max_grad_norm" not in _known(brain):
        says = "has no effect: clip to self.max_grad_norm, or step by self.optimizers_step()"
        yield remark("gradient_clip_val", says, at)


def _steps_by_brains(brain: BrainSource) -> bool:
    """Whether its updates are Brain's own ``optimizers_step``."""
    called = "optimizers_step" in _known(brain)
    return called and not brain.is_own("optimizers_step")


def _known(brain: BrainSource) -> set[str]:
    """Attributes of the Brain that it reads where it learns from a batch."""
    return {name for method in brain.learning for name in method.reads}


def _fit_batch_remarks(brain: BrainSource) -> Iterator[Remark]:
    yield from _clip_remarks(brain)
    at = brain.methods["fit_batch"]
    says = "an incomplete last window makes no update, as in SpeechBrain"
    if "grad_accumulation_factor" not in _known(brain):
        says = "has no effect: step when self.step % self.grad_accumulation_factor == 0"
    yield remark("accumulate_grad_batches", says, at)
    says = _precision_says(brain)
    if says:
        yield remark("precision", says, at)
    else:
        yield from _scaler_remarks(brain)


def _precision_says(brain: BrainSource) -> str:
    """What is amiss with how a fit_batch computes in mixed precision; empty if nothing is."""
    known = _known(brain)
    autocasts = any("autocast" in method.calls for method in brain.learning)
    if "training_ctx" in known or ("precision" in known and autocasts):
        return ""
    if {"auto_mix_prec", "bfloat16_mix_prec"} <= known and autocasts:
        return ""
    if "auto_mix_prec" in known and autocasts:
        return (
            "bf16-mixed has no effect, for self.auto_mix_prec is about 16-mixed alone: "
            "compute the loss within self.training_ctx"
        )
    if autocasts:
        return (
            "the recipe's own autocast decides, not this: compute the loss within "
            "self.training_ctx"
        )
    return "mixed precision has no effect: compute the loss within self.training_ctx"


def _scaler_remarks(brain: BrainSource) -> Iterator[Remark]:
    if "scaler" not in _known(brain):
        says = "16-mixed loses small gradients: scale the loss by self.scaler"
        yield remark("precision", says, brain.methods[_line(brain)])
