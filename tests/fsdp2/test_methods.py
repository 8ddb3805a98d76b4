"""Methods of a sharded module other than ``forward``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.sharded import assert_same_gradients, group_of_one
from tests.support.upstream import needs_shards

pytestmark = needs_shards


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    with group_of_one():
        yield


class Layer(nn.Linear):
    """A module that is used as a block."""


class Transformer(nn.Module):
    """Has methods that call each other and the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Layer(5, 5), Layer(5, 5), Layer(5, 5)

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        if depth:
            return torch.tanh(self(x, depth - 1))
        return self.third(self.decode(self.encode(x)))

    def encode(self, x: Tensor) -> Tensor:
        if x.shape[1] != 5:
            raise ValueError("no such features")
        return torch.tanh(self.first(x))

    def decode(self, x: Tensor) -> Tensor:
        return self.second(x).t()

    def generate(self, x: Tensor) -> Tensor:
        """Calls the module twice, between calls of its layers."""
        hidden = self.first(torch.tanh(self(self.second(x), 0)))
        return self.third(self(hidden, 0))


def backward(y: Tensor) -> None:
    y.pow(2).sum().backward()


def method_before_forward(model: Any, x: Tensor) -> None:
    backward(model.decode(model.encode(x)))
    backward(model(x))


def module_within_a_method(model: Any, x: Tensor) -> None:
    backward(model.generate(x))


def module_within_itself(model: Any, x: Tensor) -> None:
    backward(model(x, 2))


def change_of_a_view(model: Any, x: Tensor) -> None:
    y = model.decode(x)
    y[:, 0] = 0
    backward(y)
    backward(model(x))


def error_within_a_method(model: Any, x: Tensor) -> None:
    with pytest.raises(ValueError, match="no such features"):
        model.encode(x[:, :3])
    with pytest.raises(ValueError, match="no such features"):
        model(x[:, :3])
    backward(model(x))


def method_without_gradients(model: Any, x: Tensor) -> None:
    with torch.no_grad():
        y = model.encode(x)
    backward(model(x) + y)


@pytest.mark.parametrize("blocks", [(), ("Layer",)], ids=["whole", "blocks"])
@pytest.mark.parametrize(
    "use",
    [
        method_before_forward, module_within_a_method, module_within_itself, change_of_a_view,
        error_within_a_method, method_without_gradients,
    ],
    ids=lambda use: use.__name__,
)  # fmt: skip
def test_gradients_equal_those_of_a_plain_module(
    use: Callable[[Any, Tensor], None], blocks: tuple[str, ...]
) -> None:
    assert_same_gradients(Transformer, use, blocks=blocks)


def test_a_method_that_the_strategy_names() -> None:
    class Own(Transformer):
        def embed(self, x: Tensor) -> Tensor:
            return self.first(x)

    def use(model: Any, x: Tensor) -> None:
        backward(model(model.embed(x)))

    assert_same_gradients(Own, use, methods=["embed"])
