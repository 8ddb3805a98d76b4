"""Several loaders: combined for training, or evaluated one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from .dataloaders import is_loader, length_of


@dataclass
class SeveralLoaders:
    """The combined batches of several loaders.

    Attributes:
        loaders: The loaders.
        combine: Iterates several iterables and yields the combined batches. Its second
            argument has a flag per iterable: whether this pass has iterated it before.
        total: Returns the number of combined batches, given the lengths of all iterables.
    """

    loaders: list[Any]
    combine: Callable[[list[Any], list[bool]], Iterator[Any]]
    total: Callable[[list[Any]], float]

    def __len__(self) -> int:
        lengths = [length_of(loader) for loader in self.loaders]
        found = self.total([math.inf if each is None else each for each in lengths])
        if math.isinf(found):
            raise TypeError("some of the loaders have no length")
        return int(found)

    def __iter__(self) -> Iterator[Any]:
        return self.combine(self.loaders, [False] * len(self.loaders))


class SeveralSamplers(list[Any]):
    """The samplers of several training loaders, whose epoch is set together."""

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next passes.

        Args:
            epoch: Number of the epoch.
        """
        for sampler in self:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)


def are_several(sets: Any) -> bool:
    """Returns whether an argument of ``fit`` or ``evaluate`` is several sets.

    Args:
        sets: A dict of sets, or a list in which each element is a dataset or a loader. Any
            other dict or list is one dataset. An example is MetricGAN's dict of records by
            id, for which that recipe overrides ``make_dataloader``.
    """
    if isinstance(sets, Mapping):
        return len(sets) > 0 and all(map(_is_set, sets.values()))
    is_list = isinstance(sets, (list, tuple)) and len(sets) > 0
    return is_list and all(isinstance(each, Dataset) or is_loader(each) for each in sets)


def _is_set(value: Any) -> bool:
    if isinstance(value, Mapping):
        return are_several(value)
    return isinstance(value, (Iterable, Dataset)) and not isinstance(value, (str, bytes))


def map_sets(function: Callable[[Any], Any], sets: Any) -> Any:
    """Calls a function for each of several sets, or for the only set.

    Args:
        function: Function that gets a set.
        sets: See ``are_several``.

    Returns:
        Return values of the function, in a dict or a list, or the only return value.
    """
    if not are_several(sets):
        return function(sets)
    if isinstance(sets, Mapping):
        return {name: function(each) for name, each in sets.items()}
    return [function(each) for each in sets]


def set_names(loaders: Any) -> list[str]:
    """Returns the names of several sets for their metrics: dict keys or list positions.

    Args:
        loaders: Loaders in dicts and lists, or one loader.

    Returns:
        One name per set. The name of a single set is empty.
    """
    if isinstance(loaders, (list, tuple)) and len(loaders) == 1:
        return set_names(loaders[0])
    if isinstance(loaders, (list, tuple)):
        loaders = dict(enumerate(loaders))
    if not isinstance(loaders, Mapping):
        return [""]
    within = [(str(key), name) for key, each in loaders.items() for name in set_names(each)]
    return ["_".join(filter(None, names)) for names in within]
