"""FSDP2Strategy with each way to select it, on one and two ranks, compared with DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from brain_lightning import FSDP2Strategy
from brain_lightning.compat.versions import SHARDS
from brain_lightning.errors import UnsupportedError
from brain_lightning.fsdp2.evaluate import check_evaluation
from brain_lightning.fsdp2.sharding import Sharding
from brain_lightning.fsdp2.strategy import move_to_parameters
from brain_lightning.fsdp2.unsupported import check_offload
from tests.support.brains import make
from tests.support.live_bytes import LiveBytes
from tests.support.processes import TORCHRUN, check_python
from tests.support.sharded import fake_group_of_two

from .runs import ENTRY, RUNS, wide

pytestmark = pytest.mark.skipif(not SHARDS, reason="torch 2.8 shards")
SHARDED = [run.__name__ for run in RUNS if run.__name__ != "plain"]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("one")
    check_python("-m", "tests.fsdp2.runs", str(folder))
    return load(folder / "1-0.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    check_python(*TORCHRUN, "-m", "tests.fsdp2.runs", str(folder))
    return [load(folder / f"2-{rank}.pt") for rank in range(2)]


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def assert_learned_the_same(found: Any, expected: Any) -> None:
    weights, averages, was_sharded = found
    assert was_sharded
    assert averages == expected[1]
    # Only rank 0 has full tensors of all weights.
    assert weights.keys() <= expected[0].keys()
    assert all(torch.equal(weight, expected[0][name]) for name, weight in weights.items())


@pytest.mark.parametrize("run", SHARDED)
def test_one_process_learns_what_it_learns_without_shards(one: Any, run: str) -> None:
    assert_learned_the_same(one[run], one["plain"])
    assert one[run][0].keys() == one["plain"][0].keys()


@pytest.mark.parametrize("run", SHARDED)
def test_two_processes_learn_what_they_learn_in_ddp(two: Any, run: str) -> None:
    assert two[0]["plain"][1][0] != two[0]["plain"][1][2]
    assert two[0][run][0].keys() == two[0]["plain"][0].keys()
    for process in two:
        assert not process["plain"][2]
        assert_learned_the_same(process[run], process["plain"])


def test_modules_that_are_only_tested_are_sharded(one: Any, two: Any) -> None:
    for process in (one, *two):
        expected, gathered, not_gathered = process["only_tested"]
        assert gathered == (expected, [False, False])
        assert not_gathered == (expected, [True, True])


def test_processes_may_predict_different_numbers_of_batches(one: Any, two: Any) -> None:
    counts = []
    for process in (one, *two):
        in_shards, in_ddp = process["predicted"]
        assert torch.equal(in_shards, in_ddp)
        counts.append(len(in_shards))
    assert counts == [5, 3, 2]


def test_a_recipe_that_does_not_wrap_its_modules_raises(one: Any) -> None:
    assert "'model'] is not sharded when the optimizers are created" in one["not_wrapped"]


@pytest.mark.parametrize("run", ["from_the_cpu", "from_the_meta_device"])
def test_an_entry_is_moved_after_the_previous_entries_were_sharded(two: Any, run: str) -> None:
    for process in two:
        assert process[run] == [[0], [1], [2], [3]]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_at_most_one_entry_is_unsharded_on_the_device(device: str) -> None:
    with fake_group_of_two():
        entries, brain = wide(device)
        brain._lightning.sharding = Sharding()
        with LiveBytes() as live:
            brain.on_fit_start()
    assert [entry.moves for entry in entries.values()] == [[0], [1], [2], [3]]
    # Of four entries: the halves of all, one full entry, and the buffer that FSDP2 gathers
    # into.
    assert 4 <= live.peak / 4 / ENTRY < 4.01


def test_a_brain_moves_its_modules_unless_they_will_be_sharded() -> None:
    ddp, fsdp2 = {"trainer": {"strategy": "ddp"}}, {"trainer": {"strategy": FSDP2Strategy()}}
    assert is_moved(ddp)
    assert not is_moved(fsdp2)
    # --trainer.strategy takes precedence over the recipe.
    assert is_moved(fsdp2, **ddp)
    assert not is_moved(ddp, trainer={"strategy": "fsdp2"})


def is_moved(hparams: Any, **run_opts: Any) -> bool:
    moves: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "to", lambda self, device: moves.append(device) or self)
        make(hparams=hparams, **run_opts)
    return moves == ["cpu"]


def test_shard_eval_without_gathered_weights_raises() -> None:
    brain = make(shard_eval=True)
    check_evaluation(brain, Sharding())
    with pytest.raises(UnsupportedError, match="shard_eval gives ranks different"):
        check_evaluation(brain, Sharding(gather_to_evaluate=False))


def test_a_recovered_optimizer_state_stays_with_offloaded_shards() -> None:
    """The parameter is on the meta device, because there may be no GPU."""
    parameter = nn.Parameter(torch.zeros(2, device="meta"))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.state[parameter] = {"exp_avg": torch.zeros(2), "step": torch.zeros(())}
    move_to_parameters(optimizer)
    state = optimizer.state[parameter]
    assert state["exp_avg"].is_meta
    assert not state["step"].is_meta


def test_cpu_offload_needs_a_backend_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert FSDP2Strategy().process_group_backend is None
    backend = FSDP2Strategy(cpu_offload=True).process_group_backend
    assert backend is not None
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: backend)
    check_offload()
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cuda:nccl")
    with pytest.raises(UnsupportedError, match="--distributed_backend=cpu:gloo,cuda:nccl"):
        check_offload()


def test_a_module_without_a_brain_raises() -> None:
    with pytest.raises(UnsupportedError, match="LightningModule has no Brain"):
        FSDP2Strategy().connect(LightningModule())
