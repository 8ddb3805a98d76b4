"""What happens to one process happens to all: they end, and go on from the same place."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.environment import free_port
from tests.support.processes import ROOT, TORCHRUN, python, run_python, variables

# Lightning starts the second process.
LAUNCHERS = {"torchrun": TORCHRUN, "Lightning": ()}
TRAINS = "tests.system.distributed.trains"
pytestmark = pytest.mark.xdist_group("the same whole run")


def run(
    launcher: Iterable[str], folder: Path, what: str = "nothing", rank: int = 1
) -> subprocess.CompletedProcess[str]:
    script = ["-m", TRAINS, str(folder), what, str(rank)]
    return run_python(*launcher, *script)


def run_together(commands: Iterable[tuple[list[str], dict[str, str]]]) -> None:
    """Starts each with its own variables; all of them have to succeed."""
    started = [
        subprocess.Popen(
            command, cwd=ROOT, env=variables(**more), stderr=subprocess.PIPE, text=True
        )
        for command, more in commands
    ]
    for process in started:
        _, told = process.communicate(timeout=120)
        assert process.returncode == 0, told


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
    done = run(LAUNCHERS[launcher], tmp_path, "error", rank)
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


def test_tasks_of_slurm(tmp_path: Path, whole: list[Any]) -> None:
    """As srun starts them: each says in SLURM's own variables who it is."""
    slurm = {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    script = [sys.executable, "-m", TRAINS, str(tmp_path), "nothing", "1"]
    run_together(
        (script, {**slurm, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)})
        for task in (0, 1)
    )
    assert_same(whole, learned(tmp_path))


def test_two_nodes_of_one_process_each(tmp_path: Path, whole: list[Any]) -> None:
    """Two agents of torchrun, which meet on the loopback device."""
    command = [
        python(), "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
        "--rdzv_backend=static", "--master_addr=127.0.0.1", f"--master_port={free_port()}",
    ]  # fmt: skip
    script = ["-m", TRAINS, str(tmp_path), "nothing", "1"]
    run_together(([*command, f"--node_rank={node}", *script], {}) for node in (0, 1))
    assert_same(whole, learned(tmp_path))
