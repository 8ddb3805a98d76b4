"""Several loaders whose batches are combined, each with a position of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .dataloaders import length_of


@dataclass
class SeveralLoaders:
    """The batches of several loaders, combined.

    Attributes:
        loaders: The loaders.
        combine: Begins to iterate as many iterables together; yields what is a batch then.
        total: The number of batches of that, given the lengths of all.
    """

    loaders: list[Any]
    combine: Callable[[list[Any]], Iterator[Any]]
    total: Callable[[list[Any]], float]

    def __len__(self) -> int:
        lengths = [length_of(loader) for loader in self.loaders]
        found = self.total([math.inf if each is None else each for each in lengths])
        if math.isinf(found):
            raise TypeError("some of the loaders have no length")
        return int(found)

    def __iter__(self) -> Iterator[Any]:
        return self.combine(self.loaders)
