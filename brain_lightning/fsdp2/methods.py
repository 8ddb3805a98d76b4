"""Gathers the weights of a sharded module for methods other than ``forward``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch.nn import Module

from .hooks import without_views

# Methods that SpeechBrain's recipes call on entries of ``brain.modules``.
METHODS = (
    "encode", "decode", "forward_step", "forward_decoder", "forward_mt", "forward_asr",
    "forward_mt_decoder_only", "generate", "inference", "infer", "sample", "train_sample",
    "extract_features",
)  # fmt: skip


def register_methods(module: Module, names: Iterable[str]) -> None:
    """Makes FSDP2 gather the weights of a module for the given methods, as for ``forward``.

    The methods may call each other or the module itself, and ``forward`` may call them.
    Weights are gathered for the outermost call, and released when it returns.

    Args:
        module: Module that ``fully_shard`` was called on.
        names: Method names. Names that the module does not have are ignored.
    """
    found = [name for name in names if callable(getattr(module, name, None))]
    running: list[str] = []
    _ignore_inner_calls(module, running)
    vars(module)["forward"] = _recorded(module.forward, running)
    for name in found:
        vars(module)[name] = _registered(module, name, running)


def _ignore_inner_calls(module: Module, running: list[str]) -> None:
    """Disables FSDP2's hooks in a call of the module that runs within another call of it.

    Otherwise they would release weights that the outer call still needs, or reduce gradients
    that are not complete yet.
    """
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in hooks.items():
            if (hook.__module__ or "").startswith("torch.distributed.fsdp"):
                hooks[key] = _outermost(hook, running)


def _outermost(hook: Callable[..., Any], running: list[str]) -> Callable[..., Any]:
    @functools.wraps(hook)
    def guarded(*args: Any) -> Any:
        return None if running else hook(*args)

    return guarded


def _recorded(method: Callable[..., Any], running: list[str]) -> Callable[..., Any]:
    @functools.wraps(method)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        running.append(method.__name__)
        try:
            return method(*args, **kwargs)
        finally:
            running.pop()

    return recorded


def _registered(module: Module, name: str, running: list[str]) -> Callable[..., Any]:
    from torch.distributed.fsdp import register_fsdp_forward_method

    plain = _recorded(getattr(module, name), running)
    vars(module)[name] = lambda *args, **kwargs: without_views(plain(*args, **kwargs))
    register_fsdp_forward_method(module, name)
    gathering = getattr(module, name)

    @functools.wraps(plain)
    def method(*args: Any, **kwargs: Any) -> Any:
        return (plain if running else gathering)(*args, **kwargs)

    return method
