"""A position saved with other batches or other data is restored by its examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from speechbrain.dataio.dataloader import SaveableDataLoader as SpeechBrainLoader
from speechbrain.dataio.sampler import DynamicBatchSampler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
)

from brain_lightning.data import examples
from brain_lightning.resume import data_position
from brain_lightning.resume.data_position import DataPosition
from tests.support.resuming import Cut, Noisy, at, brain_in, fit, seed

pytestmark = [pytest.mark.filterwarnings("ignore:.*does not have many workers")]
SAVED = "The checkpoint was saved after "


class Numbers(Dataset[Any]):
    """Each example is its own index."""

    def __init__(self, items: int = 48) -> None:
        self.items = items

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> Any:
        if index >= self.items:
            raise IndexError(index)
        return torch.full((4,), float(index)), torch.zeros(2)


class Seeing(Noisy):
    """Records the examples of each batch."""

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        epoch = self.hparams.epoch_counter.current
        self.hparams.events.append((epoch, [int(x) for x in batch[0][:, 0]]))


def run(
    folder: Path, train: Any, cut: Any = None, every: int = 5, **kwargs: Any
) -> dict[int, list[list[int]]]:
    """Returns the examples of each batch of each epoch. A run that is cut saves often."""
    brain = brain_in(folder, **({"ckpt_interval_steps": every} if cut else {}))
    brain.__class__, brain.cut = Seeing, cut
    # As in the same script: the seed determines the order.
    seed(5)
    if cut is None:
        fit(brain, train, **kwargs)
    else:
        with pytest.raises(Cut):
            fit(brain, train, **kwargs)
    epochs: dict[int, list[list[int]]] = {1: [], 2: []}
    for event in brain.hparams.events:
        if len(event) == 2:
            epochs[event[0]].append(event[1])
    return epochs


def flat(batches: list[list[int]]) -> list[int]:
    return [example for batch in batches for example in batch]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if SAVED in record.message]


# ------------------------------------------------------------------ another batch size

KINDS: dict[str, Callable[[int], Any]] = {
    "shuffled": lambda size: DataLoader(Numbers(), size, shuffle=True),
    "workers": lambda size: DataLoader(Numbers(), size, shuffle=True, num_workers=2),
    "in order": lambda size: DataLoader(Numbers(), size),
    "speechbrain's": lambda size: SpeechBrainLoader(Numbers(), size, shuffle=True),
    "a batch sampler": lambda size: DataLoader(
        Numbers(), batch_sampler=BatchSampler(RandomSampler(Numbers()), size, False)
    ),
}


@pytest.mark.parametrize(
    ("kind", "size", "resumed"),
    [
        *[("shuffled", *each) for each in [(8, 16), (5, 20), (3, 18), (48, 0)]],
        *[(kind, *each) for kind in list(KINDS)[1:] for each in [(8, 16), (48, 0)]],
    ],
)
def test_another_batch_size_resumes_after_the_same_examples(
    tmp_path: Path, kind: str, size: int, resumed: int, caplog: pytest.LogCaptureFixture
) -> None:
    order = flat(run(tmp_path / "whole", KINDS[kind](4))[1])
    run(tmp_path / "cut", KINDS[kind](4), at(1, 6))
    assert not told(caplog)
    batches = run(tmp_path / "cut", KINDS[kind](size))
    assert flat(batches[1]) == order[resumed:]
    assert {len(batch) for batch in batches[1][:-1]} <= {size}
    assert sorted(flat(batches[2])) == list(range(48))
    (message,) = told(caplog)
    assert message == (
        f"{SAVED}20 of 48 examples in batches of 4. The data now has 48 examples in batches "
        f"of {size}. The epoch resumes after {resumed} of them, at the start of a batch."
    )


def test_a_loader_that_the_brain_creates(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kwargs: Any = {"train_loader_kwargs": {"batch_size": 4, "shuffle": True}}
    order = flat(run(tmp_path / "whole", Numbers(), **kwargs)[1])
    run(tmp_path / "cut", Numbers(), at(1, 6), **kwargs)
    kwargs["train_loader_kwargs"]["batch_size"] = 7
    assert flat(run(tmp_path / "cut", Numbers(), **kwargs)[1]) == order[14:]
    assert len(told(caplog)) == 1


def test_examples_that_were_seen_are_not_repeated(tmp_path: Path) -> None:
    """The last batch is smaller, because 46 is not a multiple of 5. The epoch is over."""
    run(tmp_path, DataLoader(Numbers(46), 4), at(1, 12), every=11)
    # Cut in the last batch, so that the save is before it.
    assert flat(run(tmp_path, DataLoader(Numbers(46), 4))[1]) == [44, 45]
    position = DataPosition()
    batches = position.batches(DataLoader(Numbers(46), 4))
    for _ in range(12):
        next(batches)
    state = position.state(12, None)
    assert state["examples"] == 46
    position = DataPosition()
    train = DataLoader(Numbers(46), 5)
    position.resume(state, train)
    assert list(position.batches(train)) == []
    assert position.fitted == 10


def test_cut_again_with_another_batch_size(tmp_path: Path) -> None:
    order = flat(run(tmp_path / "whole", KINDS["shuffled"](4))[1])
    run(tmp_path / "cut", KINDS["shuffled"](4), at(1, 6))
    # The step count continues: 5 steps before and 2 now.
    run(tmp_path / "cut", KINDS["shuffled"](8), at(1, 8), every=1)
    assert flat(run(tmp_path / "cut", KINDS["shuffled"](4))[1]) == order[32:]


# ------------------------------------------------------------- batches of varying size


def dynamic(longest: float, workers: int = 0, items: int = 48) -> DataLoader[Any]:
    lengths = [1.0 + (7 * i) % 5 for i in range(items)]
    sampler = DynamicBatchSampler(
        Numbers(items), longest, num_buckets=3, lengths_list=lengths, shuffle=True
    )
    return DataLoader(Numbers(items), batch_sampler=sampler, num_workers=workers)


def lists(*sizes: int) -> Callable[..., DataLoader[Any]]:
    """Batches in order, with these sizes in turn."""

    def train(workers: int = 0, persistent: bool = False) -> DataLoader[Any]:
        batches, rest = [], list(range(48))
        while rest:
            size = sizes[len(batches) % len(sizes)]
            batches.append(rest[:size])
            rest = rest[size:]
        return DataLoader(
            Numbers(),
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=persistent,
        )

    return train


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut", [at(1, 6), at(2, 6)], ids=["1", "2"])
@pytest.mark.parametrize("persistent", [False, True])
def test_examples_of_batches_of_varying_size_are_counted(
    tmp_path: Path, workers: int, cut: Any, persistent: bool, caplog: pytest.LogCaptureFixture
) -> None:
    persistent = persistent and bool(workers)
    # 2 + 4 + 6 + 2 + 4 = 18 examples are seen. The new batches start at 0, 5, 10 and 15.
    run(tmp_path, lists(2, 4, 6)(workers, persistent), cut)
    batches = run(tmp_path, lists(5)(workers, persistent))
    epoch = 1 if batches[1] else 2
    assert flat(batches[epoch]) == list(range(15, 48))
    (message,) = told(caplog)
    assert message.startswith(
        f"{SAVED}18 of 48 examples in batches of several sizes. The data now has 48 examples "
        "in batches of several sizes. The epoch resumes after 15 of them, at the start of a "
        "batch."
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_resume_without_a_warning(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    trains = {"dynamic": (2, lambda: dynamic(12, workers)), "lists": (1, lists(3, 1))}
    for name, (epoch, train) in trains.items():
        whole = run(tmp_path / name / "whole", train())
        run(tmp_path / name / "cut", train(), at(epoch, 6))
        assert run(tmp_path / name / "cut", train())[epoch] == whole[epoch][5:]
    assert not told(caplog)


def test_from_one_size_to_several_and_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "a", DataLoader(Numbers(), 4), at(1, 6))
    assert flat(run(tmp_path / "a", lists(5, 7)())[1]) == list(range(17, 48))
    run(tmp_path / "b", lists(5, 7)(), at(1, 4), every=3)
    assert flat(run(tmp_path / "b", DataLoader(Numbers(), 4))[1]) == list(range(16, 48))
    assert ["after 17 of them" in m or "after 16 of them" in m for m in told(caplog)] == [
        True
    ] * 2


def test_a_dynamic_batch_sampler_with_longer_batches(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen = len(flat(run(tmp_path / "whole", dynamic(12))[1][:5]))
    run(tmp_path / "cut", dynamic(12), at(1, 6))
    batches = run(tmp_path / "cut", dynamic(30))
    skipped = 48 - len(flat(batches[1]))
    assert 0 < skipped <= seen
    (message,) = told(caplog)
    assert f"{SAVED}{seen} of 48 examples" in message
    assert f"resumes after {skipped} of them" in message
    assert message.endswith("some are fitted twice in this epoch, or not at all.")


# ------------------------------------------------------------------------- other data


@pytest.mark.parametrize(("items", "left"), [(60, 40), (30, 10), (12, 0)])
def test_a_dataset_of_another_length_logs_a_warning(
    tmp_path: Path, items: int, left: int, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, DataLoader(Numbers(48), 4), at(1, 6))
    batches = run(tmp_path, DataLoader(Numbers(items), 4))
    assert flat(batches[1]) == list(range(items))[items - left :]
    assert flat(batches[2]) == list(range(items))
    (message,) = told(caplog)
    assert f"The data now has {items} examples in batches of 4" in message
    assert f"after {items - left} of them" in message
    assert "not at all" in message


@pytest.mark.parametrize("items", [60, 30])
@pytest.mark.parametrize("cut", [at(1, 6), at(2, 6)], ids=["1", "2"])
def test_batches_that_a_sampler_stored_are_not_used_for_other_data(
    tmp_path: Path, items: int, cut: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, dynamic(12), cut)
    batches = run(tmp_path, dynamic(12, items=items))
    assert max(flat(batches[2])) < items
    if batches[1]:
        assert sorted(flat(batches[2])) == list(range(items))
    assert len(told(caplog)) == 1


def test_a_sampler_of_another_length_logs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(samples: int) -> DataLoader[Any]:
        sampler = RandomSampler(Numbers(), replacement=True, num_samples=samples)
        return DataLoader(Numbers(), 4, sampler=sampler)

    run(tmp_path, train(48), at(1, 6))
    assert len(flat(run(tmp_path, train(100))[1])) == 80
    assert "The data now has 100 examples in batches of 4" in told(caplog)[0]


def test_a_list_of_another_length_logs_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    train, position = list(range(12)), DataPosition()
    batches = position.batches(train)
    for _ in range(5):
        next(batches)
    state, position = position.state(5, None), DataPosition()
    position.resume(state, train[:10])
    assert list(position.batches(train[:10])) == [5, 6, 7, 8, 9]
    (message,) = told(caplog)
    assert message.startswith(
        f"{SAVED}5 batches of a list of 12 batches. The data now has a list of 10 batches. "
        "The epoch resumes after 5 batches."
    )


@pytest.mark.parametrize(("before", "after", "left"), [(2, 1, 8), (1, 2, 14), (2, 4, 2)])
def test_another_number_of_processes(
    before: int, after: int, left: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The examples that all processes have seen are distributed again."""

    def train(processes: int) -> DataLoader[Any]:
        data = Numbers()
        sampler = DistributedSampler(data, processes, rank=0, shuffle=False)
        return DataLoader(data, 2, sampler=sampler)

    first = DataPosition()
    batches = first.batches(train(before))
    for _ in range(10):
        next(batches)
    state = first.state(10, None)
    second, loader = DataPosition(), train(after)
    second.resume(state, loader)
    rest = [int(x) for batch in second.batches(loader) for x in batch[0][:, 0]]
    assert rest == list(range(0, 48, after))[-left:]
    (message,) = told(caplog)
    assert f"for each of {max(before, after)} processes" in message


def test_a_missing_generator_is_ignored(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    run(tmp_path, DataLoader(Numbers(), 4, shuffle=True, generator=generator), at(1, 6))
    assert len(flat(run(tmp_path, DataLoader(Numbers(), 4, shuffle=True))[1])) == 28


# ------------------------------------------------------------------------- what is saved


def test_a_position_of_an_earlier_version_is_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state = DataPosition.state

    def earlier(self: DataPosition, *args: Any) -> Any:
        saved = state(self, *args)
        return {n: v for n, v in saved.items() if n not in ("examples", "layout")}

    for number, train in enumerate([lambda: DataLoader(Numbers(), 4), lists(4, 3)]):
        folder = tmp_path / str(number)
        whole = run(folder / "whole", train())
        monkeypatch.setattr(DataPosition, "state", earlier)
        run(folder / "cut", train(), at(1, 6))
        monkeypatch.undo()
        assert run(folder / "cut", train())[1] == whole[1][5:]
    assert not told(caplog)


def test_what_is_saved_is_plain() -> None:
    position = DataPosition()
    loader = DataLoader(Numbers(), batch_sampler=[[0, 1], [2]])
    next(position.batches(loader))
    state = position.state(1, None)
    assert state["examples"] == 2
    assert state["layout"] == {"items": 48, "batch_size": None, "length": None, "shards": 1}
    assert position.state_between_passes()["layout"] == state["layout"]


def test_batches_of_unknown_size_are_counted_as_batches() -> None:
    class Batch:
        """A batch of indices that has no length."""

        def __iter__(self) -> Any:
            return iter([1, 2])

    def train() -> DataLoader[Any]:
        return DataLoader(Numbers(), batch_sampler=[Batch()] * 5)

    position = DataPosition()
    batches = position.batches(train())
    next(batches), next(batches)
    state = position.state(2, None)
    assert state["examples"] is None
    position = DataPosition()
    position.resume(state, train())
    assert len(list(position.batches(train()))) == 3


def test_a_loader_of_batches_of_one_size_is_iterated_itself() -> None:
    loader = DataLoader(Numbers(), sampler=SequentialSampler(Numbers()), batch_size=4)
    made: list[Any] = []
    position = DataPosition()
    original = data_position.twin

    def recording(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_position, "twin", recording)
        list(position.batches(loader))
    assert not made
    assert not examples.varies(loader)
