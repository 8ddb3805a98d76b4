"""Weights that ``torch.nn.utils.prune`` has pruned, as ``ModelPruning`` does: loaded, resumed.

A pruned ``weight`` is saved as ``weight_orig`` and ``weight_mask``, which a module that is not
pruned cannot load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import prune

# What torch calls the two parts of a pruned weight, after its name.
ORIGINAL, MASK = "_orig", "_mask"


class _Weight(NamedTuple):
    """A parameter: its module, and its name there and in a state, as if it was not pruned."""

    module: nn.Module
    name: str
    key: str

    @property
    def is_pruned(self) -> bool:
        return all(hasattr(self.module, name) for name in _pruned(self.name))


def prune_as_saved(
    module: nn.Module, state: Mapping[str, Any], plain: Callable[[str], str] = str
) -> None:
    """Prunes a module where the state that it is to load is of a pruned one, and only there.

    Args:
        module: The module.
        state: What its ``load_state_dict`` is called with.
        plain: Gives the name that a parameter has in the state.
    """
    for weight in list(_weights(module, plain)):
        names = _pruned(weight.key)
        saved_pruned = set(names) <= state.keys()
        if saved_pruned and not weight.is_pruned:
            _prune(weight, state[names[1]])
        elif weight.is_pruned and not saved_pruned and weight.key in state:
            prune.remove(weight.module, weight.name)  # type: ignore[no-untyped-call]


def masks(module: nn.Module, plain: Callable[[str], str] = str) -> dict[str, Tensor]:
    """The masks of what is pruned, by the names of the weights.

    Args:
        module: The module.
        plain: Gives the name that a weight is to have.
    """
    return {
        weight.key: getattr(weight.module, _pruned(weight.name)[1])
        for weight in _weights(module, plain)
        if weight.is_pruned
    }


def restore_masks(
    module: nn.Module, saved: Mapping[str, Tensor], plain: Callable[[str], str] = str
) -> None:
    """Prunes what was pruned, where its weights were saved without their masks.

    Args:
        module: The module.
        saved: From ``masks``.
        plain: As for ``masks``.
    """
    for weight in list(_weights(module, plain)):
        if weight.key in saved and not weight.is_pruned:
            _prune(weight, saved[weight.key])


def _pruned(name: str) -> tuple[str, str]:
    return name + ORIGINAL, name + MASK


def _weights(module: nn.Module, plain: Callable[[str], str]) -> Iterator[_Weight]:
    for path, part in module.named_modules():
        for name, _ in part.named_parameters(recurse=False):
            own = name.removesuffix(ORIGINAL)
            yield _Weight(part, own, plain(f"{path}.{own}" if path else own))


def _prune(weight: _Weight, mask: Tensor) -> None:
    # The parameter stays the same object: optimizers have it.
    device = getattr(weight.module, weight.name).device
    prune.custom_from_mask(  # type: ignore[no-untyped-call]
        weight.module, weight.name, mask.to(device)
    )
