"""Modules on the meta device: initialization, and modules that cannot be initialized."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from brain_lightning.errors import UnsupportedError
from brain_lightning.fsdp2.meta import check_resets, is_meta, materialize
from tests.support.brains import loader, make

CPU = torch.device("cpu")


class Tied(nn.Module):
    """Has parts that share a weight, and nested parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4, padding_idx=0)
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LayerNorm(4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.gru = nn.GRU(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.head.weight.requires_grad_(False)


class Positions(nn.Module):
    """Has a buffer that only the constructor computes."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("table", torch.arange(3))


class Forgets(Positions):
    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)


def on_meta(cls: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return cls()


def test_all_tensors_of_a_module_are_initialized() -> None:
    module = on_meta(Tied)
    assert is_meta(module)
    check_resets("model", module)
    torch.manual_seed(3)
    materialize("model", module, CPU)
    assert not is_meta(module)
    assert module.head.weight is module.embedding.weight
    assert not module.head.weight.requires_grad
    assert not module.embedding.weight.isnan().any()
    assert module.layers[0].bias.requires_grad
    # Values are not compared: MultiheadAttention consumes random numbers in another order
    # here.
    for path, part in module.named_modules():
        assert all(t.isfinite().all() for t in part.state_dict().values()), path


def test_a_part_that_cannot_be_initialized_is_named_before_training() -> None:
    positions = nn.Sequential(nn.Linear(1, 1), on_meta(Positions))
    with pytest.raises(UnsupportedError, match=r"model\.1 \(Positions\) does not initialize"):
        check_resets("model", positions)
    forgets = on_meta(Forgets)
    check_resets("model", forgets)
    with pytest.raises(UnsupportedError, match=r"model \(Forgets\) .* its 'table'"):
        materialize("model", forgets, CPU)


def test_a_strategy_that_does_not_shard_does_not_support_the_meta_device() -> None:
    brain = make()
    brain.modules["model"] = nn.Linear(4, 2, device="meta")
    with pytest.raises(UnsupportedError, match=r"'model'.* is on the meta device"):
        brain.fit(range(1), loader())
