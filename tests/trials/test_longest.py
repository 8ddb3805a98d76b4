"""The batches that need most memory are found without reading other batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from speechbrain.dataio.dataloader import LoopedLoader, make_dataloader
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import DistributedSamplerWrapper, DynamicBatchSampler
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
)

from brain_lightning.data.several_loaders import SeveralLoaders
from brain_lightning.trials.longest import longest_batches

DURATIONS = [3, 9, 1, 7, 2, 8, 4, 6, 5, 20]


def utterances(durations: list[Any], column: str = "duration") -> tuple[Any, list[str]]:
    """Returns a dataset of a SpeechBrain recipe, and a list of the ids that were read."""
    rows = {f"utt{n}": {column: each} for n, each in enumerate(durations)}
    read: list[str] = []

    def load(name: str, duration: Any) -> torch.Tensor:
        read.append(name)
        return torch.ones(int(float(duration)))

    data = DynamicItemDataset(rows, output_keys=["id", "sig"])
    data.add_dynamic_item(load, takes=["id", column], provides="sig")
    return data, read


def drawn(loader: Any) -> list[list[int]]:
    """Returns the durations in the longest batches, as read from the batches."""
    found = longest_batches(loader)
    batches = [batch for batch, _ in zip(found.loader, range(found.count), strict=False)]
    assert len(batches) == found.count
    lengths = [
        [round(float(each)) for each in b.sig.lengths * b.sig.data.shape[1]] for b in batches
    ]
    for batch, examples, each in zip(batches, found.examples, lengths, strict=True):
        assert batch.id == examples.names
        assert examples.lengths == each
    return lengths


def in_batches(durations: list[int], size: int, **kwargs: Any) -> list[list[int]]:
    data, read = utterances(durations)
    # Workers, and a position in the middle, as recovered from a checkpoint.
    loader = make_dataloader(data, batch_size=size, num_workers=2, timeout=3, **kwargs)
    loader._speechbrain_recovery_skip_to = 1
    found = drawn(loader)
    assert sorted(read) == sorted(f"utt{durations.index(each)}" for b in found for each in b)
    assert loader._speechbrain_recovery_skip_to == 1
    assert loader.num_workers == 2
    return found


def test_longest_batches_of_shuffled_and_of_ordered_data() -> None:
    assert in_batches(DURATIONS, 3, shuffle=True) == [[20, 9, 8]]
    assert in_batches(DURATIONS, 3, sampler=SubsetRandomSampler([0, 2, 4, 6])) == [[4, 3, 2]]
    # The longest example is alone in the last batch, which may be dropped.
    assert in_batches(DURATIONS, 3) == [[3, 9, 1], [20]]
    assert in_batches(DURATIONS, 3, drop_last=True) == [[3, 9, 1]]
    assert in_batches(sorted(DURATIONS), 5) == [[6, 7, 8, 9, 20]]
    assert in_batches(DURATIONS, 20, shuffle=True, drop_last=True) == []


def test_longest_batches_of_a_dynamic_batch_sampler() -> None:
    durations = [*range(1, 21), 40]

    def loader(**kwargs: Any) -> tuple[Any, Any]:
        data, _ = utterances(durations)
        sampler = DynamicBatchSampler(data, 40, bucket_boundaries=[5, 10, 20], **kwargs)
        return sampler, make_dataloader(data, batch_sampler=sampler)

    # Buckets: 8 examples of length up to 5, 4 up to 10, 2 up to 20, and one if longer.
    _, shuffled = loader()
    assert drawn(shuffled) == [[10, 9, 8, 7], [40]]
    sampler, ordered = loader(shuffle=False, batch_ordering="ascending")
    before = [list(batch) for batch in sampler]
    assert drawn(ordered) == [[19, 20], [40]] or drawn(ordered) == [[7, 8, 9, 10], [40]]
    assert [list(batch) for batch in sampler] == before
    wrapped = DistributedSamplerWrapper(sampler, num_replicas=2, rank=1, shuffle=False)
    one_of_two = make_dataloader(utterances(durations)[0], batch_sampler=wrapped)
    assert drawn(one_of_two) == drawn(ordered)
    # A custom batch sampler is iterated once.
    data, read = utterances(DURATIONS)

    class Pairs(BatchSampler):
        """A custom batch sampler."""

    pairs = Pairs(range(10), 2, False)
    assert drawn(make_dataloader(data, batch_sampler=pairs)) == [[5, 20]]
    assert read == ["utt8", "utt9"]


def test_lengths_come_from_tables_or_from_measured_examples() -> None:
    texts, _ = utterances([f"{each}.0" for each in DURATIONS], "length")
    assert drawn(make_dataloader(texts, batch_size=2, shuffle=True)) == [[20, 9]]
    part = Subset(texts, [0, 2, 4, 3])
    chain = ConcatDataset([part, utterances([6, 1], "length")[0]])
    collate = make_dataloader(texts).collate_fn
    longest = DataLoader(chain, 2, sampler=RandomSampler(chain), collate_fn=collate)
    (examples,) = longest_batches(longest).examples
    assert examples.lengths == [7, 6]
    assert longest_batches(longest).chosen == "length"
    assert longest_batches(DataLoader(part, 2)).examples[0].names == ["utt4", "utt3"]

    class HuggingFace(list[Any]):
        column_names = ("text", "duration")

        def __getitem__(self, key: Any) -> Any:
            return [row["duration"] for row in self] if key == "duration" else 1 / 0

    rows = HuggingFace([{"duration": each} for each in DURATIONS])
    assert longest_batches(DataLoader(rows, 1)).examples[0].lengths == [20]

    class Unknown(Dataset[Any]):
        def __init__(self) -> None:
            self.read: list[int] = []

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int) -> Any:
            self.read.append(index)
            return {"sig": torch.ones(index), "text": "a"}

    unknown = Unknown()
    found = longest_batches(DataLoader(unknown, 2, shuffle=True))
    assert found.chosen == "size, of 63 of 1000 examples"
    assert found.examples[0].names == [992, 976]
    assert len(unknown.read) == 63
    in_memory = [torch.ones(each, 2) for each in DURATIONS]
    found = longest_batches(DataLoader(in_memory, batch_size=None))
    assert (found.chosen, found.examples[0].lengths) == ("size", [40])
    assert [batch.shape for batch in found.loader] == [(20, 2)]


def test_streams_give_their_first_batches_and_lists_their_largest() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(10))

    stream = DataLoader(Stream(), 3, num_workers=2)
    found = longest_batches(LoopedLoader(stream, 5))
    assert (found.count, found.chosen) == (2, "the first of a stream")
    assert next(iter(found.loader)).tolist() == [0, 1, 2]
    batches = [(torch.ones(2, each), ["text"]) for each in DURATIONS]
    found = longest_batches(batches)
    assert [next(iter(found.loader))[0].shape, found.count] == [(2, 20), 1]


def test_longest_batches_of_several_loaders() -> None:
    one, other = (
        DataLoader([torch.ones(n, each) for each in DURATIONS], 1, shuffle=True)
        for n in (1, 2)
    )

    def combine(iterables: list[Any], again: list[bool]) -> Iterator[Any]:
        return (batch for batch, *_ in CombinedLoader(iterables, "min_size"))

    found = longest_batches(SeveralLoaders([one, other], combine, min))
    (first,) = found.loader
    assert [each.shape for each in first] == [(1, 1, 20), (1, 2, 20)]
