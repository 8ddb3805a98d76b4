"""What happens to one process happens to all: they end, and go on from the same place."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ports import free_port
from tests.support.processes import (
    LAUNCHERS,
    ROOT,
    TORCHRUN,
    check_python,
    python,
    run_python,
    variables,
)

# Lightning starts the second process.
STARTED_BY = {"torchrun": TORCHRUN, "Lightning": ()}
TRAINS = "tests.system.distributed.trains"


def run(
    launcher: Iterable[str], folder: Path, what: str = "nothing", rank: int = 1, **more: str
) -> subprocess.CompletedProcess[str]:
    script = ["-m", TRAINS, str(folder), what, str(rank)]
    return run_python(*launcher, *script, **more)


def learned(folder: Path) -> list[Any]:
    one, other = (torch.load(folder / f"rank{rank}.pt") for rank in (0, 1))
    assert_same(one, other)
    return one


def assert_same(expected: list[Any], found: list[Any]) -> None:
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What a run learns to which nothing happens."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(TORCHRUN, folder)
    assert done.returncode == 0, done.stderr
    return learned(folder)


@pytest.mark.parametrize(
    ("launcher", "rank"), [("torchrun", 1), ("Lightning", 0), ("Lightning", 1)]
)
def test_an_error_on_one_rank_ends_all_and_is_told_first(
    tmp_path: Path, launcher: str, rank: int
) -> None:
    done = run(STARTED_BY[launcher], tmp_path, "error", rank)
    assert done.returncode != 0
    first = done.stderr.index("LookupError: no such word")
    for other in ("Connection closed by peer", "Connection reset by peer"):
        assert first < done.stderr.find(other) or other not in done.stderr
    assert not list(tmp_path.glob("rank*.pt"))


@pytest.mark.parametrize(("what", "rank"), [("kill", 1), ("terminate", 0), ("error", 1)])
def test_what_was_cut_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, whole: list[Any], what: str, rank: int
) -> None:
    assert run(TORCHRUN, tmp_path, what, rank).returncode != 0
    assert not list(tmp_path.glob("rank*.pt"))
    assert list((tmp_path / "save").glob("CKPT*"))
    done = run(TORCHRUN, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same(whole, learned(tmp_path))


def test_what_was_cut_goes_on_without_a_shared_disk(tmp_path: Path, whole: list[Any]) -> None:
    disks = {"SAVE_IN": "save{}"}
    assert run(TORCHRUN, tmp_path, "kill", **disks).returncode != 0
    assert list((tmp_path / "save0").glob("CKPT*"))
    assert not list((tmp_path / "save1").iterdir())
    done = run(TORCHRUN, tmp_path, **disks)
    assert done.returncode == 0, done.stderr
    assert "rank 1: none). All ranks recover CKPT+" in done.stderr
    assert_same(whole, learned(tmp_path))


def test_tasks_of_slurm(tmp_path: Path, whole: list[Any]) -> None:
    """As srun starts them: each says in SLURM's own variables who it is."""
    srun = [str(LAUNCHERS / "srun"), "--ntasks-per-node=2"]
    script = [sys.executable, "-m", TRAINS, str(tmp_path), "nothing", "1"]
    check_python(*srun, *script, real=True)
    assert_same(whole, learned(tmp_path))


def test_two_nodes_of_one_process_each(tmp_path: Path, whole: list[Any]) -> None:
    """Two agents of torchrun, which meet on the loopback device."""
    command = [
        python(), "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
        "--rdzv_backend=static", "--master_addr=127.0.0.1", f"--master_port={free_port()}",
    ]  # fmt: skip
    script = ["-m", TRAINS, str(tmp_path), "nothing", "1"]
    agents = [
        subprocess.Popen(
            [*command, f"--node_rank={node}", *script],
            cwd=ROOT, env=variables(), stderr=subprocess.PIPE, text=True,
        )
        for node in (0, 1)
    ]  # fmt: skip
    for agent in agents:
        _, told = agent.communicate(timeout=120)
        assert agent.returncode == 0, told
    assert_same(whole, learned(tmp_path))
