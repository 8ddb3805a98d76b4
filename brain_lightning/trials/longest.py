"""The batches of a loader that take most memory, found without a pass over its data."""

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
# Batches that are taken of a stream, of which nobody knows the longest.
FIRST = 2
# Batches of an unknown batch sampler that are looked at; it may never end.
MOST_BATCHES = 100_000


@dataclass(frozen=True)
class Examples:
    """What is in a batch, before it is read.

    Attributes:
        names: The ids of its examples, or their indices.
        lengths: Their lengths, where they are known.
    """

    names: list[Any]
    lengths: list[float]


@dataclass(frozen=True)
class Longest:
    """The batches of a loader that take most memory.

    Attributes:
        loader: Gives them first, made as the loader makes its batches.
        count: How many there are.
        chosen: By what they were chosen, in words.
        examples: What is in each of them; nothing where they are the first ones.
    """

    loader: Iterable[Any]
    count: int
    chosen: str
    examples: Sequence[Examples] = field(default=())


def longest_batches(loader: Any) -> Longest:
    """The batches of a loader that take most memory.

    Two of them, or one that is both: most memory grows with the number of padded frames, and
    that of attention with the square of the longest example. Where examples are shuffled the
    longest ones may meet in one batch, and are put together. Samplers may be iterated, and
    examples read: call it within a trial, which restores random states.

    Args:
        loader: What a stage iterates: a DataLoader, several, SpeechBrain's ``LoopedLoader``,
            or any iterable of batches.

    Returns:
        The batches; of a stream, whose longest nobody knows, the first ones.
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
    """The longest batches of each, combined as the loaders are."""
    found = [longest_batches(loader) for loader in several.loaders]
    loaders = [each.loader for each in found]
    chosen = ", ".join(dict.fromkeys(each.chosen for each in found))
    return Longest(
        replace(several, loaders=loaders), sum(each.count for each in found), chosen
    )


def _by_index(loader: DataLoader[Any]) -> Longest:
    sampler = unwrapped(loader.batch_sampler)
    if dynamic.is_dynamic(sampler):
        # It was told of the lengths by which it makes batches.
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
    batches = _heaviest(possible, lengths.values)
    if loader.batch_sampler is None:
        # An example is a batch.
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
    """Batches that a loader may draw, the heaviest ones among them."""
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
    """Whether a sampler draws the same batches in each epoch, as that of sorted data."""
    if isinstance(sampler, DistributedSampler):
        inner = unwrapped(sampler)
        return not sampler.shuffle and (inner is sampler or _keeps_order(inner))
    return isinstance(sampler, (SequentialSampler, Sequence))


def _heaviest(batches: Sequence[Batch], lengths: Mapping[int, float]) -> list[Batch]:
    """The batch of most padded frames, and that of most pairs of them."""

    def weight(power: int) -> Callable[[Batch], float]:
        return lambda batch: len(batch) * max(lengths.get(i, 0) for i in batch) ** power

    filled = [batch for batch in batches if batch]
    if not filled:
        return []
    found = [max(filled, key=weight(1)), max(filled, key=weight(2))]
    return found if found[0] != found[1] else found[:1]


def _in_this_process(loader: DataLoader[Any], **samplers: Any) -> DataLoader[Any]:
    """The same loader, without workers, which would read ahead."""
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
