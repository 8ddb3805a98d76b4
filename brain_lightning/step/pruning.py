"""Loads and resumes modules that were pruned, as by ``ModelPruning``.

``torch.nn.utils.prune`` saves a pruned ``weight`` as ``weight_orig`` and ``weight_mask``. A
module that is not pruned cannot load these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import prune

# Suffixes that torch adds to the name of a pruned weight.
ORIGINAL, MASK = "_orig", "_mask"


class _Weight(NamedTuple):
    """A parameter: its module, its name there, and its key in a state if it is not pruned."""

    module: nn.Module
    name: str
    key: str

    @property
    def is_pruned(self) -> bool:
        return all(hasattr(self.module, name) for name in _pruned(self.name))


def prune_as_saved(
    module: nn.Module, state: Mapping[str, Any], plain: Callable[[str], str] = str
) -> None:
    """Makes the pruning of a module match a state: prunes weights or removes their pruning.

    Args:
        module: The module.
        state: State dict that the module is going to load.
        plain: Maps the name of a parameter to its key in the state.
    """
    for weight in list(_weights(module, plain)):
        names = _pruned(weight.key)
        saved_pruned = set(names) <= state.keys()
        if saved_pruned and not weight.is_pruned:
            _prune(weight, state[names[1]])
        elif weight.is_pruned and not saved_pruned and weight.key in state:
            prune.remove(weight.module, weight.name)  # type: ignore[no-untyped-call]


def masks(module: nn.Module, plain: Callable[[str], str] = str) -> dict[str, Tensor]:
    """Returns the masks of pruned weights, by the name of the weight.

    Args:
        module: The module.
        plain: Maps the name of a weight to its key in the result.
    """
    return {
        weight.key: getattr(weight.module, _pruned(weight.name)[1])
        for weight in _weights(module, plain)
        if weight.is_pruned
    }


def restore_masks(
    module: nn.Module, saved: Mapping[str, Tensor], plain: Callable[[str], str] = str
) -> None:
    """Prunes the weights that were pruned, if they were saved without their masks.

    Args:
        module: The module.
        saved: Masks from ``masks``.
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
    # The parameter stays the same object, because optimizers refer to it.
    device = getattr(weight.module, weight.name).device
    prune.custom_from_mask(  # type: ignore[no-untyped-call]
        weight.module, weight.name, mask.to(device)
    )
