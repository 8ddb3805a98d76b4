"""Every scenario in shards, on two gloo processes, compared with DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from brain_lightning.compat.versions import REDUCES_UNUSED
from tests.parity import own_loops
from tests.parity.sides import Record, assert_moved
from tests.support.upstream import needs_shards

from . import scenarios, sharded_scenarios
from .conftest import records_of

pytestmark = needs_shards

# Of what is not bit for bit DDP's: by how much it may differ, and why.
BOUNDS = {
    "accumulated_by_tokens": (1e-14, "each batch of a window is averaged, and then added"),
    "attacked_in_fit_batch": (1e-7, "two backward passes, each averaged, and then added"),
    "bf16_and_accumulation": (1e-7, "each batch of a window is averaged, and then added"),
    "nan_on_one_rank_ends_a_window": (
        1e-6,
        "each batch of a window is averaged, and then added",
    ),
    "clipped": (1e-7, "the norm adds up the squares of one shard, and then of the other"),
}
# They fail on torch 2.8.
OF_NEWER_TORCH = {
    "a_layer_that_one_process_leaves_out": "needs set_reduce_scatter_unused_params",
    "accumulated_by_tokens": "worker.py reduces in float64, and torch 2.8 rounds otherwise",
    "batchnorm_stays_local": "worker.py reduces in float64, and torch 2.8 rounds otherwise",
}
# They say what modules are called.
CLASSES_DIFFER = ("an_unused_entry",)

LOOPS = [*own_loops.IN_TWO_PROCESSES, *own_loops.ENDED]
ALL = [*scenarios.SHARED, *LOOPS, *scenarios.OWN, *scenarios.ON_A_TRAINER]
COMPARED = [
    ("brain_lightning", row) for row in ALL if row.__name__ not in sharded_scenarios.LEFT_OUT
]
COMPARED += [("patched", row) for row in own_loops.PATTERNS]
NEW = sharded_scenarios.NEW
COMPARED += [(side, row) for row in NEW for side in ("brain_lightning", "patched")]


@pytest.fixture(scope="module")
def sharded(shared_folder: Path) -> list[dict[Any, Any]]:
    """What each rank did in shards."""
    return records_of(shared_folder / "fsdp2", STRATEGY="fsdp2")


@pytest.fixture(scope="module")
def ddp(sharded: Any, records: Any) -> list[dict[Any, Any]]:
    """What each rank did in DDP, here and elsewhere."""
    return [{**mine, **own} for mine, own in zip(records, sharded, strict=True)]


def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".module.", "."): tensor for name, tensor in tensors.items()}


def assert_as_in_ddp(found: Record, expected: Record, bound: float) -> None:
    assert found.events == expected.events or bound
    assert [loss[:-1] for loss in found.stage_losses] == [
        loss[:-1] for loss in expected.stage_losses
    ]
    for mine, other in zip(found.stage_losses, expected.stage_losses, strict=True):
        assert mine[-1] == pytest.approx(other[-1], abs=bound, rel=0, nan_ok=True)
    for mine, other in zip(found.tensors, expected.tensors, strict=True):
        assert plain(mine).keys() == plain(other).keys()
        for name, tensor in plain(mine).items():
            difference = (tensor.double() - plain(other)[name].double()).abs()
            equal = torch.equal(tensor, plain(other)[name])
            assert equal or difference.max() <= bound, f"{name}: {difference.max()}"


@pytest.mark.parametrize(
    ("side", "scenario"), COMPARED, ids=lambda value: getattr(value, "__name__", value)
)
def test_what_is_learned_is_what_ddp_learns(
    sharded: Any, ddp: Any, side: str, scenario: Any
) -> None:
    name = scenario.__name__
    if name in OF_NEWER_TORCH and not REDUCES_UNUSED:
        pytest.skip(OF_NEWER_TORCH[name])
    bound, _ = BOUNDS.get(name.partition("_ended_")[0], (0.0, ""))
    for mine, other in zip(sharded, ddp, strict=True):
        found, expected = mine[f"{side} sharded", name], other[side, name]
        assert isinstance(found, Record), found
        assert isinstance(expected, Record), expected
        assert_as_in_ddp(found, expected, bound)
        assert str(found.results) == str(expected.results) or name in CLASSES_DIFFER
        if len(found.tensors) > 1 and scenario in NEW:
            assert_moved(found)
