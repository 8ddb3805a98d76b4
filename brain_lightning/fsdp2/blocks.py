"""Selects the parts of an entry whose weights are gathered one by one."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Collection, Iterator

from torch.nn import Module, ModuleDict, ModuleList

from brain_lightning.distributed.communication import if_main_process
from brain_lightning.errors import UnsupportedError

from .sharding import AUTO

logger = logging.getLogger(__name__)

# Layers with fewer parameters are not worth a separate collective.
SMALLEST = 1_000_000

# Options with which SpeechBrain's and Hugging Face's encoders skip layers at random. Each rank
# skips different layers.
LAYERDROP = ("layerdrop_prob", "layerdrop")


def units(entry: Module) -> Iterator[Module]:
    """Yields the modules of an entry that a recipe calls directly, not within another one.

    A ``ModuleList`` or ``ModuleDict`` is not called itself: its children are yielded instead.

    Args:
        entry: An entry of ``brain.modules``.
    """
    if is_container(entry):
        for child in entry.children():
            yield from units(child)
    elif any(True for _ in entry.parameters()):
        yield entry


def is_container(module: Module) -> bool:
    """Returns whether a module only holds other modules and is not called itself.

    Args:
        module: Any module.
    """
    is_list = isinstance(module, (ModuleList, ModuleDict))
    return is_list and type(module).forward is Module.forward


def blocks(unit: Module, chosen: Collection[str] | str) -> list[Module]:
    """Returns the blocks of a unit, innermost first.

    Args:
        unit: Module to shard.
        chosen: Class names, or ``"auto"``.

    Raises:
        UnsupportedError: The unit skips layers at random, so ranks would gather different
            blocks.
    """
    if chosen == AUTO:
        layers = list(_large_layers(unit))
        if layers and (name := drops_layers(unit)):
            _warn_of_no_blocks(name)
            return []
        return layers
    found = [m for m in unit.modules() if type(m).__name__ in chosen and m is not unit]
    if found and (name := drops_layers(unit)):
        raise UnsupportedError(
            f"{name} skips layers at random, different ones on each rank. With "
            f"blocks={list(chosen)} the ranks would hang. Set it to 0, or remove blocks."
        )
    return found[::-1]


@functools.cache
def _warn_of_no_blocks(name: str) -> None:
    """Warns once that a unit is gathered as a whole, and why."""
    if if_main_process():
        logger.warning(
            "%s skips layers at random, different ones on each rank. All its layers are "
            "therefore gathered together, which takes more memory. Set it to 0 to gather the "
            "layers one by one.",
            name,
        )


def drops_layers(unit: Module) -> str:
    """Returns the option that makes a unit skip layers at random.

    Args:
        unit: Module to shard.

    Returns:
        The class and the option, as in ``"Encoder with layerdrop=0.1"``. An empty string if
        the unit does not skip layers.
    """
    for module in unit.modules():
        for owner in (module, getattr(module, "config", None)):
            for option in LAYERDROP:
                value = getattr(owner, option, 0)
                if isinstance(value, (int, float)) and value > 0:
                    return f"{type(module).__name__} with {option}={value}"
    return ""


def _large_layers(unit: Module) -> Iterator[Module]:
    """Yields large layers of ``ModuleList``s that share no parameter with other modules."""
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
    """Counts the attributes of a module and its parts that refer to each parameter."""
    return Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
