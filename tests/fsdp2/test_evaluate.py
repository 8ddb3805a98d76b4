"""Weights that are whole in VALID and TEST."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from brain_lightning.errors import UnsupportedError
from brain_lightning.fsdp2.evaluate import gathered
from brain_lightning.fsdp2.shard import shard_modules
from brain_lightning.fsdp2.sharding import Sharding
from brain_lightning.fsdp2.tensors import is_shard
from tests.support.sharded import brain_of, group_of_one


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    with group_of_one():
        yield


def shards_while_it_evaluates(sharding: Sharding) -> list[bool]:
    """Which of the weights are shards after a use of them."""
    brain = brain_of(model=nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1)))
    brain._lightning.sharding = sharding
    shard_modules(brain, sharding)
    x = torch.randn(3, 5, requires_grad=True)
    with gathered(brain):
        # An attack on the input has a backward pass.
        torch.autograd.grad(brain.modules.model(x).sum(), x)
        found = [is_shard(p) for p in brain.modules.parameters()]
        with torch.no_grad():
            brain.modules.model(x)
        found += [is_shard(p) for p in brain.modules.parameters()]
    assert all(is_shard(p) for p in brain.modules.parameters())
    return found


def test_weights_stay_whole_after_each_use() -> None:
    assert not any(shards_while_it_evaluates(Sharding()))


def test_weights_are_released_after_each_use_if_the_strategy_says_so() -> None:
    assert all(shards_while_it_evaluates(Sharding(gather_to_evaluate=False)))


def test_weights_whose_memory_numpy_has_are_refused_in_words() -> None:
    brain = brain_of(model=nn.Linear(5, 1))
    shard_modules(brain, Sharding())
    with gathered(brain):
        brain.modules.model.weight.detach().clone().numpy()
    with (
        pytest.raises(UnsupportedError, match=r"on weights.*\.clone\(\)\.numpy\(\)"),
        gathered(brain),
    ):
        brain.modules.model.weight.detach().numpy()
