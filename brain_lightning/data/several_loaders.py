"""Several loaders: combined to one for training, or each a set to evaluate by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from .dataloaders import is_loader, length_of


@dataclass
class SeveralLoaders:
    """The batches of several loaders, combined.

    Attributes:
        loaders: The loaders.
        combine: Begins to iterate as many iterables together, some of which have been
            iterated before in this pass; yields what is a batch then.
        total: The number of batches of that, given the lengths of all.
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
    """The samplers of several training loaders, which learn the epoch together."""

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the next passes are shuffled for.

        Args:
            epoch: The epoch's number.
        """
        for sampler in self:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)


def are_several(sets: Any) -> bool:
    """Whether an argument of ``fit`` or ``evaluate`` is several sets, and not one dataset.

    Args:
        sets: A dict of sets, or a list of nothing but datasets and loaders; a dict or a list
            of anything else is a dataset, as MetricGAN's dict of records by their ids is,
            for which that recipe has a ``make_dataloader`` of its own.
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
    """Calls a function with each of several sets, or with the only one.

    Args:
        function: What to do with a set.
        sets: See ``are_several``.

    Returns:
        What the function returned: a dict, a list, or the only one.
    """
    if not are_several(sets):
        return function(sets)
    if isinstance(sets, Mapping):
        return {name: function(each) for name, each in sets.items()}
    return [function(each) for each in sets]


def set_names(loaders: Any) -> list[str]:
    """What the numbers of several sets are called by: their keys, or positions in a list.

    Args:
        loaders: Loaders in dicts and lists, or one.

    Returns:
        A name for each; an empty one for a set that stands alone.
    """
    if isinstance(loaders, (list, tuple)) and len(loaders) == 1:
        return set_names(loaders[0])
    if isinstance(loaders, (list, tuple)):
        loaders = dict(enumerate(loaders))
    if not isinstance(loaders, Mapping):
        return [""]
    within = [(str(key), name) for key, each in loaders.items() for name in set_names(each)]
    return ["_".join(filter(None, names)) for names in within]
