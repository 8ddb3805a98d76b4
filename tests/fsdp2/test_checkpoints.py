"""Checkpoints of sharded modules equal those of DDP, and resume with any strategy."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.processes import TORCHRUN, check_python
from tests.support.upstream import needs_shards

from . import saving

pytestmark = needs_shards

RANKS = (0, 1)
# Values that depend on the time and the host of a save, and checksums of files with them.
OF_THE_RUN = {"saved_by", "unixtime", "checksums.yaml"}
# FSDP2 averages the gradients of a window batch by batch, DDP once.
ROUNDING = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which two ranks have saved checkpoints and their results."""
    folder = tmp_path_factory.mktemp("saving")
    check_python(*TORCHRUN, "-m", "tests.fsdp2.saving", str(folder))
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    """Results by rank and row."""
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in RANKS]
    for row in found[0].values():
        assert not isinstance(row, str), row
    return found


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[n].double() - other[n].double()).abs().max()) for n in one)


def content(path: Path) -> dict[str, Any]:
    """Returns the content of a checkpoint by file."""
    if path.is_file():
        return {path.name: torch.load(path, weights_only=False)}
    files = sorted(each for each in path.rglob("*") if each.is_file())
    return {
        str(each.relative_to(path)): torch.load(each, weights_only=False)
        if zipfile.is_zipfile(each)
        else _lines(each)
        for each in files
    }


def _lines(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    return [line for line in lines if line.partition(":")[0] not in OF_THE_RUN]


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Compares types, order and values, and the sizes of the storages of tensors."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one.keys() - OF_THE_RUN:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            assert_same(mine, theirs, f"{where}/{index}")
    elif isinstance(one, Tensor):
        assert torch.equal(one, other), where
        assert one.untyped_storage().nbytes() == other.untyped_storage().nbytes(), where
    elif "unixtime" not in str(one):
        assert str(one).replace("-ddp", "-fsdp2") == str(other), where


def saved_in(folder: Path) -> list[dict[str, Any]]:
    """Returns the checkpoints in a folder, oldest first."""
    return [content(path) for path in sorted(folder.iterdir(), key=_time)]


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns


@pytest.mark.parametrize("saver", saving.SAVERS)
def test_files_equal_those_of_ddp(folder: Path, rows: Any, saver: str) -> None:
    ddp, fsdp2 = (saved_in(folder / f"{saver}-{each}") for each in saving.STRATEGIES)
    assert len(ddp) == len(fsdp2) > 1
    for one, other in zip(ddp, fsdp2, strict=True):
        assert_same(one, other)
    for row in rows:
        learned = row["saved"]
        assert difference(learned[saver, "ddp"], learned[saver, "fsdp2"]) == 0


@pytest.mark.parametrize("row", ["resumed", "from_exceptions"])
def test_a_run_that_was_interrupted_in_a_window_resumes(rows: Any, row: str) -> None:
    """Results are bitwise identical with the same strategy, else equal up to rounding."""
    for rank in rows:
        whole = rank["resumed"]["whole"]
        for how, learned in rank[row].items():
            is_same = how in ("whole", "speechbrain", ("fsdp2", "fsdp2"))
            assert difference(whole, learned) <= (0 if is_same else ROUNDING), how


def test_one_process_resumes_what_two_have_saved(folder: Path, rows: Any) -> None:
    of = saving.moved(folder)
    ddp, fsdp2 = of["ddp", "auto"], of["fsdp2", "auto"]
    assert difference(ddp, rows[0]["resumed"]["whole"]) > 0
    assert difference(ddp, fsdp2) < ROUNDING


def test_resuming_from_and_in_speechbrains_own_loop(rows: Any) -> None:
    for rank in rows:
        of = rank["native"]
        assert difference(of["ddp"], of["fsdp2"]) == 0
        assert difference(of["back", "ddp"], of["back", "fsdp2"]) == 0
        assert difference(of["back", "ddp"], of["ddp"]) > 0


def test_hooks_and_optimizers_of_a_recipe(rows: Any) -> None:
    for rank in rows:
        first, *others = rank["custom"].values()
        assert [difference(first, each) for each in others] == [0, 0]


def test_speechbrains_checkpointer_finds_the_same_files_in_all_processes(rows: Any) -> None:
    """It lists the files right after a save. If the lists differ, the ranks hang."""
    assert rows[0]["listed"] == rows[1]["listed"]
    assert {"brain_lightning", "counter"} < set(rows[0]["listed"]["brain_lightning"])
    assert {"encoder", "optimizer"} < set(rows[0]["listed"]["encoder"])


def test_a_rank_that_cannot_save_does_not_hang_the_other_rank(rows: Any) -> None:
    for rank, row in enumerate(rows):
        found = row["failures"]
        assert found["not finite"] is None
        assert "CKPT+good" in found["saved"]
        assert not {"CKPT+failed", "CKPT+nan"} & set(found["saved"])
        for name in ("part", "counter"):
            for failing in RANKS:
                assert "No space left on device" in found[name, failing]
                is_other = "another rank could not save" in found[name, failing]
                assert is_other == (rank != failing)
