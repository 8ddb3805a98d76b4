"""FSDP2Strategy in every way in, in one process and in two, against no shards."""

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
    # The first process has all of them.
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


def test_a_recipe_that_does_not_wrap_its_modules_is_refused(one: Any) -> None:
    assert (
        "'model'] is not sharded when the optimizers are created" in one["wrapped_by_nobody"]
    )


@pytest.mark.parametrize("run", ["from_the_cpu", "from_the_meta_device"])
def test_an_entry_is_moved_when_those_before_it_are_sharded(two: Any, run: str) -> None:
    for process in two:
        assert process[run] == [[0], [1], [2], [3]]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_more_than_one_entry_is_whole_until_all_are_sharded(device: str) -> None:
    with fake_group_of_two():
        entries, brain = wide(device)
        brain._lightning.sharding = Sharding()
        with LiveBytes() as live:
            brain.on_fit_start()
    assert [entry.moves for entry in entries.values()] == [[0], [1], [2], [3]]
    # Of four: their halves, one whole, and the buffer in which FSDP2 gathers it.
    assert 4 <= live.peak / 4 / ENTRY < 4.01


def test_a_brain_moves_its_modules_unless_they_are_going_to_be_sharded() -> None:
    ddp, fsdp2 = {"trainer": {"strategy": "ddp"}}, {"trainer": {"strategy": FSDP2Strategy()}}
    assert is_moved(ddp)
    assert not is_moved(fsdp2)
    # --trainer.strategy outranks the recipe.
    assert is_moved(fsdp2, **ddp)
    assert not is_moved(ddp, trainer={"strategy": "fsdp2"})


def is_moved(hparams: Any, **run_opts: Any) -> bool:
    moves: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "to", lambda self, device: moves.append(device) or self)
        make(hparams=hparams, **run_opts)
    return moves == ["cpu"]


def test_processes_that_would_evaluate_different_numbers_of_batches_are_refused() -> None:
    brain = make(shard_eval=True)
    check_evaluation(brain, Sharding())
    with pytest.raises(UnsupportedError, match="shard_eval gives ranks different"):
        check_evaluation(brain, Sharding(gather_to_evaluate=False))


def test_what_is_recovered_of_an_optimizer_stays_with_shards_on_the_cpu() -> None:
    """The device of the parameter is "meta" here: there may be no GPU."""
    parameter = nn.Parameter(torch.zeros(2, device="meta"))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.state[parameter] = {"exp_avg": torch.zeros(2), "step": torch.zeros(())}
    move_to_parameters(optimizer)
    state = optimizer.state[parameter]
    assert state["exp_avg"].is_meta
    assert not state["step"].is_meta


def test_shards_on_the_cpu_need_a_backend_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert FSDP2Strategy().process_group_backend is None
    backend = FSDP2Strategy(cpu_offload=True).process_group_backend
    assert backend is not None
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: backend)
    check_offload()
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cuda:nccl")
    with pytest.raises(UnsupportedError, match="--distributed_backend=cpu:gloo,cuda:nccl"):
        check_offload()


def test_a_module_that_is_of_no_brain_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="LightningModule has no Brain"):
        FSDP2Strategy().connect(LightningModule())
