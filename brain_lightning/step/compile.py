"""Compiles modules with torch.compile or torch.jit.script."""

from __future__ import annotations

import logging
from typing import Any

import torch

from brain_lightning.errors import RunOptionError
from brain_lightning.fsdp2.evaluate import is_sharded
from brain_lightning.protocol import BrainProtocol

logger = logging.getLogger(__name__)


def compile_modules(brain: BrainProtocol) -> None:
    """Compiles the modules that the run options name (``speechbrain.Brain._compile``).

    If both compilers are requested, ``torch.compile`` is tried first.

    Args:
        brain: Brain whose ``compile`` and ``jit`` options select the modules.

    Raises:
        RunOptionError: A key is not an entry of ``modules``.
    """
    compile_keys = _keys(brain, "compile", brain.compile_module_keys) if brain.compile else []
    jit_keys = _keys(brain, "jit", brain.jit_module_keys) if brain.jit else []
    compiled = {name for name in compile_keys if _compile(brain, name)}
    for name in jit_keys:
        if name not in compiled:
            _script(brain, name)


def compile_jit(brain: BrainProtocol) -> None:
    """Compiles ``jit_module_keys`` without ``jit``, as SpeechBrain before 0.5.16 did.

    Args:
        brain: Brain. Modules that ``compile_modules`` compiled are not changed.

    Raises:
        RunOptionError: A key is not an entry of ``modules``.
    """
    if brain.jit or brain.jit_module_keys is None:
        return
    for name in _keys(brain, "jit", brain.jit_module_keys):
        if not hasattr(brain.modules[name], "_orig_mod"):
            _script(brain, name)


def _script(brain: BrainProtocol, name: str) -> None:
    brain.modules[name] = torch.jit.script(brain.modules[name]).to(brain.device)


def _keys(brain: BrainProtocol, option: str, keys: list[str] | None) -> list[str]:
    if keys is None:
        # The value of an entry is None if the recipe leaves the module out.
        return [name for name, module in brain.modules.items() if module is not None]
    logger.warning(
        "--%s compiles only the modules in --%s_module_keys: %s", option, option, keys
    )
    for name in keys:
        if name not in brain.modules:
            raise RunOptionError(
                f"{option}_module_keys has {name!r}, which is not an entry of modules. Use "
                f"some of {', '.join(brain.modules)}."
            )
    return list(keys)


def _compile(brain: BrainProtocol, name: str) -> bool:
    # Compile the original of a module that an earlier fit compiled, not the compiled one.
    plain = getattr(brain.modules[name], "_orig_mod", brain.modules[name])
    if plain is not brain.modules[name] and is_sharded(brain.modules[name]):
        # Sharding gathers the weights for the module that is already compiled.
        return True
    try:
        module: Any = torch.compile(
            plain,
            mode=brain.compile_mode,
            fullgraph=brain.compile_using_fullgraph,
            dynamic=brain.compile_using_dynamic_shape_tracing,
        )
    except Exception as error:  # noqa: BLE001  any compiler may fail in any way
        logger.warning("%r failed to compile and is used uncompiled: %s", name, error)
        return False
    # A module that is going to be sharded is moved to the device when it is sharded.
    is_moved = brain._lightning.sharding is None
    brain.modules[name] = module.to(brain.device) if is_moved else module
    return True
