"""What a Brain subclass overrides, and what follows from it."""

from __future__ import annotations

from .errors import BrainTypeError, UnsupportedError
from .protocol import BrainProtocol

# A subclass that overrides one of these does its own stepping.
MANUAL_HOOKS = ("fit_batch", "optimizers_step")
# What fit_batch calls, and has no default.
REQUIRED_HOOKS = ("compute_forward", "compute_objectives")
# Private parts of SpeechBrain's Brain that a subclass may have overridden in vain.
LOOP_HOOKS = (
    "_fit_train",
    "_fit_valid",
    "_should_save_intra_epoch_ckpt",
    "_save_intra_epoch_ckpt",
    "_compile",
    "_wrap_distributed",
)


def steps_itself(brain_class: type) -> bool:
    """Whether a Brain class does its own stepping."""
    return any(_overrides(brain_class, hook) for hook in MANUAL_HOOKS)


def _overrides(brain_class: type, hook: str) -> bool:
    # The class that first defines a hook is Brain itself, ours or SpeechBrain's.
    return sum(hook in vars(cls) for cls in brain_class.__mro__) > 1


def check_hooks(brain: BrainProtocol) -> None:
    """Tells of a hook that is missing, or never called, before a batch is loaded.

    Args:
        brain: The Brain that is going to train.

    Raises:
        BrainTypeError: A hook without default is not overridden.
        UnsupportedError: A part of SpeechBrain's loop is overridden.
    """
    brain_class = type(brain)
    for hook in LOOP_HOOKS:
        if any(hook in vars(cls) for cls in brain_class.__mro__):
            raise UnsupportedError(
                f"{brain_class.__name__} overrides {hook}, a part of SpeechBrain's loop, "
                "which is the Trainer's here: use a hook of Brain, or a Lightning callback"
            )
    for hook in () if _overrides(brain_class, "fit_batch") else REQUIRED_HOOKS:
        if not _overrides(brain_class, hook) and hook not in vars(brain):
            raise BrainTypeError(
                f"{brain_class.__name__} must define {hook}, or override fit_batch"
            )
