"""A snapshot restores any object that is reachable from a Brain."""

from __future__ import annotations

import array
import random
import weakref
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from brain_lightning.trials.snapshot import DATA, Snapshot
from tests.support.brains import all_equal


class Slots:
    __slots__ = ("__hidden", "later", "seen")

    def __init__(self) -> None:
        self.__hidden, self.seen = 0, []

    def change(self) -> None:
        self.__hidden, self.later = 1, 2
        self.seen.append(3)

    def state(self) -> Any:
        return self.__hidden, self.seen, hasattr(self, "later")


class OfClass:
    calls, losses = 0, []

    def change(self) -> None:
        OfClass.calls += 1
        self.losses.append(1)


class Refuses(list):  # type: ignore[type-arg]
    """Raises in every method that the snapshot must not call."""

    __hash__ = None  # type: ignore[assignment]

    def _fail(self, *_: Any) -> Any:
        raise RuntimeError("no answer")

    clear = extend = __bool__ = __len__ = __iter__ = __eq__ = __getattr__ = _fail  # type: ignore[assignment]


class Lies:
    @property
    def __class__(self) -> Any:
        raise RuntimeError("no class")

    @property
    def __dict__(self) -> Any:
        raise RuntimeError("no attributes")


def counting() -> Any:
    calls, seen = 0, []

    def count() -> None:
        nonlocal calls
        calls += 1
        seen.append(calls)
        count.last = calls  # type: ignore[attr-defined]

    count.last, count.state = 0, lambda: (calls, seen, count.last)  # type: ignore[attr-defined]
    return count


def test_python_objects_are_restored() -> None:
    ordered = OrderedDict(a=1, b=2, c=3)
    ordered.move_to_end("a")
    held, count, key = {random.Random(3)}, counting(), OfClass()  # noqa: S311
    kept = SimpleNamespace(
        slots=Slots(), of_class=OfClass(), count=count, ordered=ordered, held=held,
        default=defaultdict(list), user=UserDict(x=[]), counter=Counter("ab"),
        array=array.array("d", [1]), objects=np.array([[], None], dtype=object),
        numbers=np.zeros(3), bits=np.random.PCG64(1), last=deque([1, 2], maxlen=2),
        weak=weakref.WeakKeyDictionary({key: []}), system=random.SystemRandom(),
        refuses=Refuses([1]), lies=Lies(), mocks=[mock.MagicMock(spec=torch.Tensor)],
        proxy=weakref.proxy(OfClass()), class_=Slots,
    )  # fmt: skip

    def state() -> Any:
        return repr((
            kept.slots.state(), OfClass.calls, OfClass.losses, count.state(), list(ordered),
            [each.getstate() for each in held], kept.default, kept.user, kept.counter,
            kept.array, kept.objects, kept.numbers, kept.bits.state, kept.last,
            kept.weak[key], list.__repr__(kept.refuses), sorted(vars(kept)),
        ))  # fmt: skip

    snapshot, before = Snapshot(kept), state()
    kept.slots.change()
    kept.of_class.change()
    count()
    ordered.move_to_end("b")
    next(iter(held)).random()
    kept.default["x"].append(1)
    kept.user["y"] = kept.user["x"].append(1)
    kept.counter.update("bc")
    kept.array.append(2)
    kept.objects[0].append(1)
    kept.numbers.resize(5, refcheck=False)
    kept.bits.random_raw()
    kept.last.append(3)
    kept.weak[key].append(1)
    list.append(kept.refuses, 2)
    kept.new = 1
    assert state() != before
    snapshot.restore()
    assert state() == before


@pytest.mark.filterwarnings("ignore:.*prototype stage:UserWarning")
@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_tensors_are_restored() -> None:
    weight, window = nn.Parameter(torch.ones(2)), torch.ones(1).expand(3)
    weight.seen = 0  # type: ignore[attr-defined]
    kept_graph = weight.exp()
    loss = kept_graph.exp().sum()
    hidden = torch.zeros(2)
    lazy = nn.LazyLinear(3)
    script = torch.jit.script(nn.BatchNorm1d(2)).eval()
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    buffers = {name: each.clone() for name, each in script.state_dict().items()}
    roots = (weight, window, kept_graph, hidden, lazy, script, nested)
    snapshot = Snapshot(roots)
    hidden.add_(weight)
    weight.register_hook(lambda gradient: 2 * gradient)
    weight.seen = 1  # type: ignore[attr-defined]
    with torch.no_grad():
        window[:1] += 1
        nested.mul_(2)
    lazy(torch.ones(1, 4))
    script.train()
    script(torch.randn(4, 2))
    snapshot.restore()
    loss.backward()
    assert torch.allclose(weight.grad, torch.e * torch.tensor(torch.e).exp().expand(2))
    assert weight.seen == 0  # type: ignore[attr-defined]
    assert window.tolist() == [1, 1, 1]
    assert hidden.is_leaf
    assert not hidden.requires_grad
    assert nested.unbind()[1].tolist() == [1, 1, 1]
    assert all_equal(buffers.values(), script.state_dict().values())
    assert not script.training
    assert isinstance(lazy, nn.LazyLinear)
    assert lazy(torch.ones(1, 5)).shape == (1, 3)


class Augmented(Dataset[Any]):
    """Uses a separate random generator."""

    def __init__(self) -> None:
        self.items, self.drawn = [[i] for i in range(DATA + 1)], 0
        self.random = np.random.default_rng(1)

    def __getitem__(self, index: int) -> Any:
        self.drawn += 1
        return self.items[index], self.random.random()


def test_a_dataset_is_restored_without_its_data() -> None:
    dataset, plain = Augmented(), [[i] for i in range(DATA + 1)]
    snapshot = Snapshot([DataLoader(dataset), DataLoader(plain)])  # type: ignore[arg-type]
    drawn = dataset[0][1]
    snapshot.restore()
    assert dataset.drawn == 0
    assert dataset[0][1] == drawn
    reached = {id(each) for each in snapshot.objects}
    assert reached.isdisjoint(map(id, [dataset.items, dataset.items[0], plain, plain[0]]))


class Sharding(torch.optim.SGD):
    """Is defined in torch.distributed, like ``ZeroRedundancyOptimizer``."""

    __module__ = "torch.distributed.optim"


def test_an_optimizer_of_torch_distributed_is_restored() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = Sharding([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    snapshot = Snapshot(optimizer)
    optimizer.step()
    snapshot.restore()
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [1, 1]
    assert weight.tolist() == pytest.approx([0.9, 0.9])


def test_a_generator_that_has_advanced_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    def batches() -> Iterator[int]:
        number = 0
        while True:
            yield number
            number += 1

    kept = SimpleNamespace(stays=batches(), goes=batches())
    for each in vars(kept).values():
        next(each)
    snapshot = Snapshot(kept)
    next(kept.goes)
    snapshot.restore()
    assert caplog.text.count("training will not get them") == 1


def test_an_error_in_one_object_does_not_stop_restoring() -> None:
    bytes_ = bytearray(b"a")
    kept = SimpleNamespace(bytes_=bytes_, last=[1])
    snapshot = Snapshot(kept)
    bytes_ += b"b"
    kept.last.append(2)
    with memoryview(bytes_), pytest.raises(BufferError):
        snapshot.restore()
    assert kept.last == [1]
