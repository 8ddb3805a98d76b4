"""Finds the batches of a DataLoader that need most memory, without reading all data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import nlargest
from itertools import islice
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from brain_lightning.compat import dynamic_batches as dynamic
from brain_lightning.compat.speechbrain import clear_position, is_looped_loader
from brain_lightning.data.dataloaders import has_indices, length_of, twin
from brain_lightning.data.samplers import unwrapped
from brain_lightning.data.several_loaders import SeveralLoaders

from .lengths import Lengths, lengths_of, name_of, size_of

Batch = list[int]
# Number of batches to take from a stream, whose longest batches are not known.
FIRST = 2
# Maximum number of batches to read from a custom batch sampler, which may be infinite.
MOST_BATCHES = 100_000


@dataclass(frozen=True)
class Examples:
    """The examples of a batch, known before the batch is read.

    Attributes:
        names: Ids of the examples, or their indices.
        lengths: Their known lengths.
    """

    names: list[Any]
    lengths: list[float]


@dataclass(frozen=True)
class Longest:
    """The batches of a DataLoader that need most memory.

    Attributes:
        loader: Yields these batches first, with the collate function of the DataLoader.
        count: Number of these batches.
        chosen: Description of how they were chosen.
        examples: Examples of each batch. Empty if the first batches were chosen.
    """

    loader: Iterable[Any]
    count: int
    chosen: str
    examples: Sequence[Examples] = field(default=())


def longest_batches(loader: Any) -> Longest:
    """Returns the batches of a DataLoader that need most memory.

    These are up to two batches. Most memory grows with the number of padded frames, and the
    memory of attention with the square of the longest example. If the examples are shuffled,
    the longest ones may occur in the same batch, so they are combined into one. This function
    may iterate samplers and read examples. Call it within a trial, which restores random
    states.

    Args:
        loader: A DataLoader, several DataLoaders, SpeechBrain's ``LoopedLoader``, or any
            iterable of batches.

    Returns:
        The longest batches. For a stream, the first batches.
    """
    if isinstance(loader, SeveralLoaders):
        return _of_several(loader)
    if is_looped_loader(loader):
        return longest_batches(loader.loader)
    if has_indices(loader) and length_of(loader.dataset) is not None:
        return _by_index(loader)
    if isinstance(loader, DataLoader):
        return Longest(_in_this_process(loader), FIRST, "the first of a stream")
    if isinstance(loader, Sequence):
        return Longest(sorted(loader, key=size_of, reverse=True), min(1, len(loader)), "size")
    return Longest(loader, FIRST, "the first of an iterable")


def _of_several(several: SeveralLoaders) -> Longest:
    """Returns the longest batches of each DataLoader, combined like the DataLoaders."""
    found = [longest_batches(loader) for loader in several.loaders]
    loaders = [each.loader for each in found]
    chosen = ", ".join(dict.fromkeys(each.chosen for each in found))
    return Longest(
        replace(several, loaders=loaders), sum(each.count for each in found), chosen
    )


def _by_index(loader: DataLoader[Any]) -> Longest:
    sampler = unwrapped(loader.batch_sampler)
    if dynamic.is_dynamic(sampler):
        # The sampler has the lengths by which it creates batches.
        lengths = Lengths(dynamic.lengths(sampler), "length")
        possible = dynamic.fixed_batches(sampler)
        if possible is None:
            possible = [
                _longest_of(indices, most, lengths.values)
                for indices, most in dynamic.buckets(sampler)
            ]
    else:
        lengths = lengths_of(loader.dataset)
        possible = _possible(loader, lengths.values)
    batches = _largest_batches(possible, lengths.values)
    if loader.batch_sampler is None:
        # Without a batch sampler each example is a batch.
        drawn = _in_this_process(loader, sampler=[index for (index,) in batches])
    else:
        drawn = _in_this_process(loader, batch_sampler=batches)
    examples = [
        Examples(
            [name_of(loader.dataset, index) for index in batch],
            [lengths.values[index] for index in batch if index in lengths.values],
        )
        for batch in batches
    ]
    return Longest(drawn, len(batches), lengths.source, examples)


def _possible(loader: DataLoader[Any], lengths: Mapping[int, float]) -> list[Batch]:
    """Returns batches that a DataLoader may yield, including those that need most memory."""
    batches = unwrapped(loader.batch_sampler)
    if batches is not None and type(batches) is not BatchSampler:
        return [list(batch) for batch in islice(batches, MOST_BATCHES)]
    size, drops = (1, False) if batches is None else (batches.batch_size, batches.drop_last)
    sampler = loader.sampler if batches is None else batches.sampler
    if _keeps_order(sampler):
        indices = list(sampler)
    else:
        indices = _longest_of(_drawn_from(sampler, loader), size, lengths)
    batches_of = [indices[start : start + size] for start in range(0, len(indices), size)]
    return [batch for batch in batches_of if len(batch) == size or not drops]


def _drawn_from(sampler: Any, loader: DataLoader[Any]) -> Sequence[int]:
    if isinstance(sampler, SubsetRandomSampler):
        return sampler.indices
    return range(len(loader.dataset))  # type: ignore[arg-type]


def _longest_of(indices: Iterable[int], most: int, lengths: Mapping[int, float]) -> Batch:
    return nlargest(most, indices, key=lambda index: lengths.get(index, 0))


def _keeps_order(sampler: Any) -> bool:
    """Returns whether a sampler yields the same order in each epoch."""
    if isinstance(sampler, DistributedSampler):
        inner = unwrapped(sampler)
        return not sampler.shuffle and (inner is sampler or _keeps_order(inner))
    return isinstance(sampler, (SequentialSampler, Sequence))


def _largest_batches(batches: Sequence[Batch], lengths: Mapping[int, float]) -> list[Batch]:
    """Returns the batch with most padded frames, and the batch with most pairs of frames."""

    def weight(power: int) -> Callable[[Batch], float]:
        return lambda batch: len(batch) * max(lengths.get(i, 0) for i in batch) ** power

    filled = [batch for batch in batches if batch]
    if not filled:
        return []
    found = [max(filled, key=weight(1)), max(filled, key=weight(2))]
    return found if found[0] != found[1] else found[:1]


def _in_this_process(loader: DataLoader[Any], **samplers: Any) -> DataLoader[Any]:
    """Returns a copy of a DataLoader without workers, because workers would prefetch."""
    new = twin(
        loader,
        num_workers=0,
        prefetch_factor=None,
        persistent_workers=False,
        timeout=0,
        **samplers,
    )
    clear_position(new)
    return new
