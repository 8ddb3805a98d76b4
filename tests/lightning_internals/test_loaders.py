"""Warnings for training loaders that are not split between ranks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from speechbrain.dataio.dataloader import LoopedLoader
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from brain_lightning import DistributedSamplerWrapper, to_lightning
from brain_lightning.lightning_internals.loaders import warn_if_whole
from tests.support.brains import dataset, make, trainer_with


class Stream(IterableDataset[Any]):
    pipeline: Any = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(range(8))


def split_by_node(source: Any) -> Any:
    """A stream as in webdataset, which has its stages in a list."""


class SplitStream(Stream):
    pipeline = (functools.partial(split_by_node, ()),)


ITEMS: Any = range(8)
SHARD = {"num_replicas": 2, "rank": 0}
WHOLE = {
    "loader": (lambda: DataLoader(ITEMS), "The training loader has no distributed sampler"),
    "looped": (
        lambda: LoopedLoader(DataLoader(ITEMS), 3),
        "The training loader has no distributed sampler",
    ),
    "stream": (lambda: DataLoader(Stream()), "The training stream is not split between ranks"),
}
SHARED = {
    "sampler": lambda: DataLoader(ITEMS, sampler=DistributedSampler(ITEMS, **SHARD)),
    "wrapped": lambda: DataLoader(
        ITEMS, batch_sampler=DistributedSamplerWrapper([[0, 1], [2, 3]], **SHARD)
    ),
    "webdataset": lambda: DataLoader(SplitStream()),
    # A generator of the recipe cannot be checked.
    "generator": lambda: iter(ITEMS),
}
TRAINER: Any = SimpleNamespace(world_size=2, is_global_zero=True)


@pytest.mark.parametrize("case", WHOLE)
def test_a_loader_that_is_not_shared_out_is_warned_of_once(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, message = WHOLE[case]
    loader = make()
    for _ in range(2):
        warn_if_whole([loader], TRAINER)
    (record,) = caplog.records
    assert message in record.getMessage()
    assert "each of the 2 processes trains on the full" in record.getMessage()


@pytest.mark.parametrize("case", SHARED)
def test_one_that_is_shared_out_is_not(case: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_if_whole([SHARED[case]()], TRAINER)
    assert not caplog.records


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_sampler_in_a_loader_of_the_trainer_learns_the_epoch() -> None:
    class Told(DistributedSampler[Any]):
        epochs: tuple[int, ...] = ()

        def set_epoch(self, epoch: int) -> None:
            self.epochs += (epoch,)

    data, own = dataset(), Told(ITEMS, **SHARD)
    sampler = Told(data, **SHARD)
    brain = make()
    brain.train_sampler = own
    trained = DataLoader(data, 4, sampler=sampler)
    trainer_with(max_epochs=3).fit(to_lightning(brain), trained, DataLoader(data, 4))
    assert sampler.epochs == own.epochs == (1, 2, 3)
    assert brain.train_sampler is own
