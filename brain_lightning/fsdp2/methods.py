"""Methods of a sharded module that use its weights, besides ``forward``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch.nn import Module

# What SpeechBrain's recipes call on an entry of modules.
METHODS = (
    "encode", "decode", "forward_step", "forward_decoder", "forward_mt", "forward_asr",
    "forward_mt_decoder_only", "generate", "inference", "infer", "sample", "train_sample",
    "extract_features",
)  # fmt: skip


def register_methods(module: Module, names: Iterable[str]) -> None:
    """Has weights gathered for methods of a module, as for ``forward``.

    ``forward`` may call them too, and they may call each other: weights are released when
    the outermost one returns.

    Args:
        module: A module that ``fully_shard`` was called on.
        names: Names of methods; those that the module does not have are left out.
    """
    found = [name for name in names if callable(getattr(module, name, None))]
    if not found:
        return
    running: list[str] = []
    vars(module)["forward"] = _recorded(module.forward, running)
    for name in found:
        vars(module)[name] = _registered(module, name, running)


def _recorded(method: Callable[..., Any], running: list[str]) -> Callable[..., Any]:
    @functools.wraps(method)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        running.append(method.__name__)
        try:
            return method(*args, **kwargs)
        finally:
            running.pop()

    return recorded


def _registered(module: Any, name: str, running: list[str]) -> Callable[..., Any]:
    from torch.distributed.fsdp import register_fsdp_forward_method

    plain = _recorded(getattr(module, name), running)

    @functools.wraps(plain)
    def keeping_weights(*args: Any, **kwargs: Any) -> Any:
        # It may call the module itself.
        module.set_reshard_after_forward(False, recurse=False)
        try:
            return plain(*args, **kwargs)
        finally:
            module.set_reshard_after_forward(True, recurse=False)

    vars(module)[name] = keeping_weights
    register_fsdp_forward_method(module, name)
    gathering = getattr(module, name)

    @functools.wraps(plain)
    def method(*args: Any, **kwargs: Any) -> Any:
        return (plain if running else gathering)(*args, **kwargs)

    return method
