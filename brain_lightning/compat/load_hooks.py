"""Adapts load hooks of SpeechBrain 0.5, which have an argument ``device``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

Hook = Callable[..., Any]

# Arguments of a load hook, including its object.
LOAD_HOOK = ("self", "path", "end_of_epoch")

_device: ContextVar[Any] = ContextVar("device", default=None)


@contextmanager
def loading_to(device: Any, otherwise: Any = None) -> Iterator[None]:
    """Passes a device to load hooks that need one.

    Args:
        device: The device. None uses the device of the surrounding context.
        otherwise: Device to use if ``device`` is None and there is no surrounding context.

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
    """Returns the device to which SpeechBrain 0.5 loads the checkpoints of a Brain.

    Args:
        brain: A Brain. The result is None for an object without a device.
    """
    name = getattr(brain, "device", None)
    return None if name is None else torch.device(name)


def without_device(hook: Hook, *arguments: str) -> Hook:
    """Returns a hook that can be called without a device, as SpeechBrain 1 does.

    Args:
        hook: The hook. If it has a parameter ``device``, or one parameter more than the
            arguments, it gets the device of ``loading_to``. Otherwise it is returned as is.
        *arguments: Names of its other arguments.

    Returns:
        A function with these arguments, which may also be called with a device.
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

    # inspect.signature must not return the signature of the wrapped hook.
    del called.__wrapped__
    return called


def takes_device(function: Callable[..., Any]) -> bool:
    """Returns whether a function has an argument with the name ``device``."""
    try:
        device = inspect.signature(function).parameters.get("device")
    except ValueError:
        # Some functions that are implemented in C have no signature.
        return False
    return device is not None and device.kind is not device.POSITIONAL_ONLY


def binds(function: Callable[..., Any], *arguments: str) -> bool:
    """Returns whether a function can be called with this number of arguments."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:
        return True
    return True
