"""Load hooks of SpeechBrain 0.5, which have an argument ``device``; from 1.0 on none has."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

Hook = Callable[..., Any]

# What a load hook is called with, its object first.
LOAD_HOOK = ("self", "path", "end_of_epoch")

_device: ContextVar[Any] = ContextVar("device", default=None)


@contextmanager
def loading_to(device: Any, otherwise: Any = None) -> Iterator[None]:
    """Gives hooks that ask for a device this one.

    Args:
        device: The device; None leaves the one that was given around it.
        otherwise: The device where none was given.

    Yields:
        None
    """
    given = (device, _device.get(), otherwise)
    token = _device.set(next((each for each in given if each is not None), None))
    try:
        yield
    finally:
        _device.reset(token)


def device_of(brain: Any) -> torch.device | None:
    """What SpeechBrain 0.5 loads a Brain's checkpoints to.

    Args:
        brain: A Brain; anything without a device has None.
    """
    name = getattr(brain, "device", None)
    return None if name is None else torch.device(name)


def without_device(hook: Hook, *arguments: str) -> Hook:
    """A hook as SpeechBrain 1 calls it, whichever form it has.

    Args:
        hook: One with a parameter ``device``, or with one more than the arguments, gets the
            device of ``loading_to``; any other one is returned as it is.
        *arguments: What it is called with besides.

    Returns:
        A function that takes these arguments, and may still be called with a device.
    """
    by_name = takes_device(hook)
    if not by_name and (binds(hook, *arguments) or not binds(hook, *arguments, "device")):
        return hook

    @functools.wraps(hook)
    def called(*args: Any, **kwargs: Any) -> Any:
        if len(args) > len(arguments) or "device" in kwargs:
            return hook(*args, **kwargs)
        if by_name:
            return hook(*args, device=_device.get(), **kwargs)
        return hook(*args, _device.get(), **kwargs)

    # Whoever looks at the signature is to see this one.
    del called.__wrapped__
    return called


def takes_device(function: Callable[..., Any]) -> bool:
    """Whether a function has an argument of the name ``device``."""
    try:
        device = inspect.signature(function).parameters.get("device")
    except ValueError:
        # Some functions of C have no signature.
        return False
    return device is not None and device.kind is not device.POSITIONAL_ONLY


def binds(function: Callable[..., Any], *arguments: str) -> bool:
    """Whether a function can be called with so many arguments."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:
        return True
    return True
