"""Hooks that make a sharded module behave like a plain module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from brain_lightning.errors import UnsupportedError
from tests.support.sharded import assert_same_gradients, group_of_one, shard
from tests.support.upstream import needs_shards

pytestmark = needs_shards


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    with group_of_one():
        yield


class Turned(nn.Linear):
    def __init__(self) -> None:
        super().__init__(5, 5)

    def forward(self, x: Tensor) -> Any:
        return {"y": (super().forward(x).t(), 3)}


def test_a_returned_view_can_be_changed_in_place() -> None:
    def use(model: Any, x: Tensor) -> None:
        y = model(x)["y"][0]
        y[:, 0] = 0
        y.pow(2).sum().backward()

    assert_same_gradients(Turned, use)


def without_backward(model: Any, x: Tensor) -> None:
    model(x)
    model(x).sum().backward()


def without_gradients(model: Any, x: Tensor) -> None:
    with torch.no_grad():
        y = model(x)
    (model(x) * y).sum().backward()


def after_an_error(model: Any, x: Tensor) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(x[:, :3])
    model(x).sum().backward()


def called_twice(model: Any, x: Tensor) -> None:
    model(model(x)).sum().backward()


def computed_again(model: Any, x: Tensor) -> None:
    checkpoint(model, x, use_reentrant=False).pow(2).sum().backward()


def backward_twice(model: Any, x: Tensor) -> None:
    y = model(x)
    y.sum().backward(retain_graph=True)
    y.pow(2).sum().backward()


@pytest.mark.parametrize(
    "use",
    [
        without_backward, without_gradients, after_an_error, called_twice, computed_again,
        backward_twice,
    ],
    ids=lambda use: use.__name__,
)  # fmt: skip
def test_gradients_equal_those_of_a_plain_module(use: Callable[[Any, Tensor], None]) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))

    assert_same_gradients(make, use)


def test_tensors_in_an_object_raise() -> None:
    class Returns(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(length=3, loss=super().forward(x).sum())

    model = shard(Returns(5, 5))
    with pytest.raises(UnsupportedError, match="SimpleNamespace that holds a tensor"):
        model(torch.ones(2, 5))
    with torch.no_grad():
        assert model(torch.ones(2, 5)).length == 3
