"""Modules that were built on the meta device: of their weights there is the shape alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from brain_lightning.errors import UnsupportedError
from brain_lightning.protocol import BrainProtocol

# By which a part of a module gives itself its first values, in the order of the calls.
RESETS = ("reset_parameters", "_reset_parameters", "reset_buffers")


def is_meta(module: Module) -> bool:
    """Whether a module, or a part of it, has no memory yet.

    Args:
        module: An entry of ``brain.modules``.
    """
    return any(tensor.is_meta for tensor in chain(module.parameters(), module.buffers()))


def check_memory(brain: BrainProtocol) -> None:
    """Refuses modules on the meta device, where nothing is going to materialize them.

    Args:
        brain: The Brain of a run whose strategy does not shard.

    Raises:
        UnsupportedError: There is one.
    """
    if not is_meta(brain.modules):
        return
    for name, module in brain.modules.items():
        if module is not None and is_meta(module):
            raise UnsupportedError(
                f"modules[{name!r}] is on the meta device, and has no weights: give the "
                "Trainer strategy='fsdp2', which initializes it, or build it on the CPU"
            )


def check_resets(name: str, module: Module) -> None:
    """Refuses a module that cannot be initialized after it was built.

    Args:
        name: Of the entry of ``brain.modules``.
        module: What is there.

    Raises:
        UnsupportedError: A part of it cannot; it is named.
    """
    for path, part in module.named_modules():
        if _on_meta(part) and not any(hasattr(part, reset) for reset in RESETS):
            raise _no_values(name, path, part, next(iter(_on_meta(part))))


def materialize(name: str, module: Module, device: torch.device) -> None:
    """Gives a module memory and its first values.

    The parts of a part come before it, as they do where it is built.

    Args:
        name: Of the entry of ``brain.modules``.
        module: What is there.
        device: Where its weights are to be.

    Raises:
        UnsupportedError: A part of it leaves something uninitialized.
    """
    parts = [(path, part) for path, part in _inner_first(module) if _on_meta(part)]
    # What several parts share they share after it.
    made: dict[Tensor, Tensor] = {}
    for _, part in parts:
        for key, tensor in _on_meta(part).items():
            setattr(part, key, made.setdefault(tensor, _without_values(tensor, device)))
    for path, part in parts:
        with torch.no_grad():
            for reset in RESETS:
                getattr(part, reset, lambda: None)()
        for key, tensor in _own(part).items():
            if _is_without_values(tensor):
                raise _no_values(name, path, part, key)


def _inner_first(module: Module, path: str = "") -> Iterator[tuple[str, Module]]:
    for name, child in module.named_children():
        yield from _inner_first(child, f"{path}.{name}" if path else name)
    yield path, module


def _own(part: Module) -> dict[str, Tensor]:
    """Parameters and buffers that are not those of its parts."""
    parameters = part.named_parameters(recurse=False, remove_duplicate=False)
    return {**dict(parameters), **dict(part.named_buffers(recurse=False))}


def _on_meta(part: Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in _own(part).items() if tensor.is_meta}


def _unset(tensor: Tensor) -> float | int | None:
    """What no initialization gives; None where that is not known."""
    if tensor.is_floating_point() or tensor.is_complex():
        return float("nan")
    signed = tensor.dtype.is_signed and tensor.dtype is not torch.int8
    return torch.iinfo(tensor.dtype).min if signed else None


def _without_values(tensor: Tensor, device: torch.device) -> Tensor:
    empty = torch.empty_like(tensor, device=device, requires_grad=False)
    if (unset := _unset(tensor)) is not None:
        empty.fill_(unset)
    if not isinstance(tensor, Parameter):
        return empty
    return Parameter(empty, tensor.requires_grad)


def _is_without_values(tensor: Tensor) -> bool:
    unset = _unset(tensor)
    if unset is None:
        return False
    found = torch.isnan(tensor) if unset != unset else tensor == unset
    return bool(found.any())


def _no_values(name: str, path: str, part: Module, key: str) -> UnsupportedError:
    where = ".".join(filter(None, (name, path)))
    return UnsupportedError(
        f"modules[{name!r}] is on the meta device, and {where} ({type(part).__name__}) does "
        f"not initialize its {key!r}: give it a reset_parameters() that does, or build this "
        "entry on the CPU"
    )
