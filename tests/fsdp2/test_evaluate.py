"""Weights are gathered in VALID and TEST."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from brain_lightning.errors import UnsupportedError
from brain_lightning.fsdp2.evaluate import gathered
from brain_lightning.fsdp2.shard import shard_modules
from brain_lightning.fsdp2.sharding import Sharding
from brain_lightning.fsdp2.tensors import is_shard, whole
from tests.support.sharded import brain_of, group_of_one
from tests.support.upstream import needs_shards

pytestmark = needs_shards


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    with group_of_one():
        yield


def shards_while_it_evaluates(sharding: Sharding) -> list[bool]:
    """Returns which weights are shards after they were used."""
    brain = brain_of(model=nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1)))
    brain._lightning.sharding = sharding
    shard_modules(brain, sharding)
    x = torch.randn(3, 5, requires_grad=True)
    with gathered(brain):
        # An adversarial attack on the input runs a backward pass.
        torch.autograd.grad(brain.modules.model(x).sum(), x)
        found = [is_shard(p) for p in brain.modules.parameters()]
        with torch.no_grad():
            brain.modules.model(x)
        found += [is_shard(p) for p in brain.modules.parameters()]
    assert all(is_shard(p) for p in brain.modules.parameters())
    return found


def test_weights_stay_gathered_after_each_use() -> None:
    assert not any(shards_while_it_evaluates(Sharding()))


def test_weights_are_released_after_each_use_without_gather_to_evaluate() -> None:
    assert all(shards_while_it_evaluates(Sharding(gather_to_evaluate=False)))


def test_numpy_of_a_gathered_weight_raises() -> None:
    brain = brain_of(model=nn.Linear(5, 1))
    shard_modules(brain, Sharding())
    with gathered(brain):
        brain.modules.model.weight.detach().clone().numpy()
    with (
        pytest.raises(
            UnsupportedError,
            match=r"on the gathered weight 'weight'.*\.clone\(\)\.numpy\(\)",
        ),
        gathered(brain),
    ):
        brain.modules.model.weight.detach().numpy()


@pytest.mark.parametrize("saves", [False, True])
def test_changes_of_gathered_weights_are_applied_to_shards(saves: bool) -> None:
    """on_stage_end of VALID may change weights. Calling state_dict there releases them."""
    brain = brain_of(model=nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 1)))
    model = brain.modules.model
    model[0].requires_grad_(False)
    shard_modules(brain, Sharding())
    with gathered(brain):
        model[0].requires_grad_(True)
        nn.init.ones_(model[1].weight)
        brain.optimizer = torch.optim.Adagrad(brain.modules.parameters(), lr=0.5)
        if saves:
            assert torch.equal(model.state_dict()["1.weight"], torch.ones(1, 5))
    assert all(p.requires_grad and is_shard(p) for p in model.parameters())
    model(torch.ones(1, 5)).sum().backward()
    brain.optimizer.step()
    assert not torch.equal(whole(model[1].weight), torch.ones(1, 5))
    assert torch.equal(
        whole(model[1].bias), whole(brain.optimizer.param_groups[0]["params"][3])
    )
    assert all(is_shard(state["sum"]) for state in brain.optimizer.state.values())


def test_changes_of_shards_are_preserved_while_weights_are_gathered() -> None:
    """A weight average may write to parameters that it stored before gathering."""
    brain = brain_of(model=nn.Linear(5, 5))
    shard_modules(brain, Sharding())
    weight = brain.modules.model.weight
    with gathered(brain), torch.no_grad():
        weight.fill_(2)
    assert torch.equal(whole(brain.modules.model.weight), torch.full((5, 5), 2.0))
