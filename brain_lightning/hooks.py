"""What a Brain subclass overrides, and what follows from it."""

from __future__ import annotations

from .errors import BrainTypeError, UnsupportedError
from .protocol import BrainProtocol

# A subclass that overrides one of these does its own stepping.
MANUAL_HOOKS = ("fit_batch", "optimizers_step")
# What fit_batch calls, and has no default.
REQUIRED_HOOKS = ("compute_forward", "compute_objectives")


def steps_itself(brain_class: type, brain: BrainProtocol | None = None) -> bool:
    """Whether a Brain does its own stepping.

    Args:
        brain_class: Its class.
        brain: The Brain, which may have a hook of its own.

    Returns:
        True where one of ``MANUAL_HOOKS`` is overridden.
    """
    own = () if brain is None else vars(brain)
    return any(overrides(brain_class, hook) or hook in own for hook in MANUAL_HOOKS)


def overrides(brain_class: type, hook: str) -> bool:
    """Whether a subclass of Brain has a hook of its own.

    Args:
        brain_class: The class of a Brain.
        hook: A method of Brain.
    """
    # The class that first defines a hook is Brain itself, ours or SpeechBrain's.
    return sum(hook in vars(cls) for cls in brain_class.__mro__) > 1


def has_own(brain: BrainProtocol, hook: str) -> bool:
    """Whether a Brain has a hook of its own, by its class or by itself.

    Args:
        brain: The Brain.
        hook: A method of Brain.
    """
    return hook in vars(brain) or overrides(type(brain), hook)


def check_hooks(brain: BrainProtocol) -> None:
    """Tells of a hook that is missing, or never called, before a batch is loaded.

    Args:
        brain: The Brain that is going to train.

    Raises:
        BrainTypeError: A hook without default is not overridden.
        UnsupportedError: A part of SpeechBrain's loop is overridden.
    """
    brain_class = type(brain)
    if overrides(brain_class, "_fit_train"):
        raise UnsupportedError(
            f"{brain_class.__name__} overrides _fit_train, a part of SpeechBrain's loop, "
            "which is the Trainer's here: use a hook of Brain, such as on_stage_start or "
            "on_fit_batch_end, or a Lightning callback"
        )
    for hook in () if overrides(brain_class, "fit_batch") else REQUIRED_HOOKS:
        if not overrides(brain_class, hook) and hook not in vars(brain):
            raise BrainTypeError(
                f"{brain_class.__name__} must define {hook}, or override fit_batch"
            )
