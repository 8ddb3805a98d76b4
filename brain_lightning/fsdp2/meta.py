"""Initializes modules that were built on the meta device, where tensors have no memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from brain_lightning.errors import UnsupportedError
from brain_lightning.protocol import BrainProtocol

# Methods that initialize the tensors of a module, in the order in which they are called.
RESETS = ("reset_parameters", "_reset_parameters", "reset_buffers")


def is_meta(module: Module) -> bool:
    """Returns whether a module or a part of it is on the meta device.

    Args:
        module: An entry of ``brain.modules``.
    """
    return any(tensor.is_meta for tensor in chain(module.parameters(), module.buffers()))


def check_memory(brain: BrainProtocol) -> None:
    """Checks that no module is on the meta device, for strategies that do not materialize it.

    Args:
        brain: The Brain of a run whose strategy does not shard.

    Raises:
        UnsupportedError: A module is on the meta device.
    """
    if not is_meta(brain.modules):
        return
    for name, module in brain.modules.items():
        if module is not None and is_meta(module):
            raise UnsupportedError(
                f"modules[{name!r}] is on the meta device, and this strategy does not "
                "initialize it. Use strategy='fsdp2', or build the module on the CPU."
            )


def check_resets(name: str, module: Module) -> None:
    """Checks that each part of a module on the meta device has a method that initializes it.

    Args:
        name: Key of the entry in ``brain.modules``.
        module: Module of that entry.

    Raises:
        UnsupportedError: A part has no such method. The message names it.
    """
    for path, part in module.named_modules():
        if _on_meta(part) and not any(hasattr(part, reset) for reset in RESETS):
            raise _no_values(name, path, part, next(iter(_on_meta(part))))


def materialize(name: str, module: Module, device: torch.device) -> None:
    """Allocates and initializes the tensors of a module that are on the meta device.

    Children are initialized before their parents, as when a module is built.

    Args:
        name: Key of the entry in ``brain.modules``.
        module: Module of that entry.
        device: Device for the tensors.

    Raises:
        UnsupportedError: A part does not initialize all of its tensors.
    """
    parts = [(path, part) for path, part in _inner_first(module) if _on_meta(part)]
    # A tensor that several parts share is allocated once and stays shared.
    allocated: dict[Tensor, Tensor] = {}
    for _, part in parts:
        for key, tensor in _on_meta(part).items():
            setattr(part, key, allocated.setdefault(tensor, _without_values(tensor, device)))
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
    """Returns the parameters and buffers of a module, without those of its children."""
    parameters = part.named_parameters(recurse=False, remove_duplicate=False)
    return {**dict(parameters), **dict(part.named_buffers(recurse=False))}


def _on_meta(part: Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in _own(part).items() if tensor.is_meta}


def _unset(tensor: Tensor) -> float | int | None:
    """Returns a value that no initialization produces, or None if there is no such value."""
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
        f"not initialize its {key!r}. Give this class a reset_parameters() method that "
        f"initializes {key!r}, or build modules[{name!r}] on the CPU."
    )
