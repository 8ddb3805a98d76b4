"""The state dict of a sharded module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from brain_lightning.fsdp2 import state_dict
from brain_lightning.fsdp2.shard import shard_modules
from brain_lightning.fsdp2.sharding import Sharding
from brain_lightning.fsdp2.tensors import whole
from tests.support.sharded import brain_of, group_of_one
from tests.support.upstream import needs_shards

pytestmark = needs_shards


def test_a_weight_with_several_names_is_saved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    # In one process the gathered tensor may share the memory of the shard.
    monkeypatch.setattr(state_dict, "on_main", lambda value: whole(value).clone())
    with group_of_one():
        brain = brain_of(model=model)
        shard_modules(brain, Sharding())
        for _ in range(2):
            with torch.no_grad():
                whole(model[0].weight).add_(1)
            state = brain.modules.state_dict()
            first, second = state["model.0.weight"], state["model.1.weight"]
            assert first is not second
            assert first.data_ptr() == second.data_ptr() != state["model.1.bias"].data_ptr()
            assert torch.equal(first, whole(model[0].weight))
        own: dict[str, torch.Tensor] = {}
        brain.modules.state_dict(destination=own)
        assert torch.equal(own["model.1.weight"], first)
