"""The parts of an entry that are gathered one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

from torch.nn import Module, ModuleDict, ModuleList

from brain_lightning.errors import UnsupportedError

from .sharding import AUTO

# Fewer parameters are not worth a collective of their own.
SMALLEST = 1_000_000

# By which SpeechBrain's and Hugging Face's encoders leave out a layer by chance, in each
# process another one.
LAYERDROP = ("layerdrop_prob", "layerdrop")


def units(entry: Module) -> Iterator[Module]:
    """The modules of an entry that are called: a list of modules is not.

    Args:
        entry: An entry of ``brain.modules``.
    """
    if is_container(entry):
        for child in entry.children():
            yield from units(child)
    elif any(True for _ in entry.parameters()):
        yield entry


def is_container(module: Module) -> bool:
    """Whether a module only holds others, which are called one by one.

    Args:
        module: Any module.
    """
    is_list = isinstance(module, (ModuleList, ModuleDict))
    return is_list and type(module).forward is Module.forward


def blocks(unit: Module, chosen: Collection[str] | str) -> list[Module]:
    """The blocks of a unit, the innermost first.

    Args:
        unit: What is sharded.
        chosen: Names of classes, or ``"auto"``.

    Raises:
        UnsupportedError: Processes would gather different blocks.
    """
    if chosen == AUTO:
        return [] if _drops_layers(unit) else list(_large_layers(unit))
    found = [m for m in unit.modules() if type(m).__name__ in chosen and m is not unit]
    if found and (name := _drops_layers(unit)):
        raise UnsupportedError(
            f"{name} leaves out layers by chance, in each process others, which then wait for "
            f"each other for ever: set it to 0, or leave out blocks={list(chosen)}"
        )
    return found[::-1]


def _drops_layers(unit: Module) -> str:
    """By which of its options a unit leaves out layers; empty where it does not."""
    for module in unit.modules():
        for owner in (module, getattr(module, "config", None)):
            for option in LAYERDROP:
                value = getattr(owner, option, 0)
                if isinstance(value, (int, float)) and value > 0:
                    return f"{type(module).__name__} with {option}={value}"
    return ""


def _large_layers(unit: Module) -> Iterator[Module]:
    """Layers in lists that are large, and share no parameter with anything outside."""
    uses, taken = _uses(unit), set[int]()
    for holder in unit.modules():
        for layer in holder.children() if isinstance(holder, ModuleList) else ():
            own = _uses(layer)
            is_alone = all(uses[each] == count for each, count in own.items())
            size = sum(p.numel() for p in layer.parameters())
            if size >= SMALLEST and is_alone and not taken & own.keys():
                taken |= own.keys()
                if not is_container(layer):
                    yield layer


def _uses(module: Module) -> Counter[int]:
    """How often each parameter is an attribute of a part of the module."""
    return Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
