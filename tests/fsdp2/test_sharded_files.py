"""``FSDP2Strategy(sharded_checkpoints=True)``: writing and reading sharded checkpoints."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from speechbrain.utils.checkpoints import Checkpointer as SpeechBrainCheckpointer
from torch import nn

from brain_lightning import Checkpointer
from brain_lightning.callback.sharded_checkpoints import reconcile_sharded_checkpoints
from brain_lightning.checkpoints.checkpoint import average_checkpoints
from brain_lightning.checkpoints.integrity import (
    CHECKSUMS,
    check,
    write_checksums,
    write_checksums_together,
)
from brain_lightning.cli.convert import convert
from brain_lightning.errors import CheckpointError, UnsafeCheckpointError, UnsupportedError
from brain_lightning.fsdp2.sharding import Sharding
from brain_lightning.temporary import TemporaryAttributes
from tests.support.brains import make
from tests.support.processes import TORCHRUN, check_python
from tests.support.upstream import needs_shards

from . import shard_writers as writers

pytestmark = needs_shards

RANKS = (0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the checkpoints of two ranks, and their results in ``rank0.pt``."""
    folder = tmp_path_factory.mktemp("shards")
    check_python(*TORCHRUN, "-m", writers.__name__, str(folder))
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[Any]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in RANKS]


@pytest.fixture
def saved(folder: Path, tmp_path: Path) -> Path:
    """Returns a copy of the checkpoints from within a window and from the end of an epoch."""
    for name in ("window", "end"):
        shutil.copytree(folder / "straight" / f"CKPT+{name}", tmp_path / f"CKPT+{name}")
    return tmp_path


def flat(value: Any, place: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """Returns values by their keys, without ``module.``, with which names start under DDP."""
    items = dict(enumerate(value)) if isinstance(value, list) else value
    if not isinstance(items, dict):
        return {place: value}
    parts = [flat(v, (*place, str(n).removeprefix("module."))) for n, v in items.items()]
    return {name: each for part in parts for name, each in part.items()}


def same(one: Any, other: Any) -> bool:
    first, second = flat(one), flat(other)
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) if torch.is_tensor(value) else value == second[name]
        for name, value in first.items()
    )


def whole(folder: Path, name: str) -> dict[str, Any]:
    """Returns the content of the full checkpoint that was saved at the same time."""
    path = folder / "straight" / f"CKPT+{name}_whole"
    return {each: torch.load(path / f"{each}.ckpt") for each in writers.IN_SHARDS}


def test_each_process_writes_its_part(folder: Path) -> None:
    for name in ("net", "optimizer"):
        path = folder / "straight" / "CKPT+window" / f"{name}.ckpt"
        total = (folder / "straight" / "CKPT+window_whole" / f"{name}.ckpt").stat().st_size
        sizes = [(path / f"__{rank}_0.distcp").stat().st_size for rank in RANKS]
        # torch writes a header for each shard.
        assert 0.4 * total < min(sizes) <= max(sizes) < 0.6 * total
    assert (folder / "straight" / "CKPT+window" / "brain.ckpt").is_file()


def test_each_process_reads_its_part(folder: Path, found: list[Any]) -> None:
    # What is whole in each process.
    others = ("step", "running_mean", "running_var", "num_batches_tracked")
    for name in writers.IN_SHARDS:
        parts = [found[rank]["straight"]["read"][name] for rank in RANKS]
        state = flat(whole(folder, "window")[name])
        sizes = {place: t.numel() for place, t in state.items() if torch.is_tensor(t)}
        total = sum(n for place, n in sizes.items() if not str(place[-1]).endswith(others))
        assert sum(parts) == total
        assert max(parts) <= total / 2 + 8


@pytest.mark.parametrize("row", [row.__name__ for row in writers.RESUMED])
def test_a_resumed_run_learns_the_same(folder: Path, found: list[Any], row: str) -> None:
    result, straight = found[0][row], found[0]["straight"]
    name = row.partition("_")[0]
    assert same(result["recovered"], whole(folder, name))
    assert not same(result["trained"], result["recovered"])
    # DDP averages the gradients of a window once, FSDP2 averages them for each batch.
    reference = found[0]["end_whole_ddp"] if row.endswith("ddp") else straight
    assert same(result["trained"], reference["trained"])


def test_shards_are_sent_to_a_process_that_has_none(found: list[Any]) -> None:
    rank0 = found[0]
    assert same(rank0["without_shared_disk"]["trained"], rank0["straight"]["trained"])


def test_lightnings_file_is_whole(folder: Path, found: list[Any]) -> None:
    content = torch.load(folder / "straight" / "lightning" / "last.ckpt", weights_only=False)
    trained = found[0]["straight"]["trained"]
    weights = {f"{n}.{k}": v for n in ("net", "tied") for k, v in trained[n].items()}
    lightnings = {k.partition("modules.")[2]: v for k, v in content["state_dict"].items()}
    assert same(lightnings, weights)


def test_speechbrains_checkpointer_cannot_read_it(found: list[Any]) -> None:
    for rank in RANKS:
        words = "was saved with sharded_checkpoints=True, which SpeechBrain's Checkpointer "
        assert words in found[rank]["speechbrains_checkpointer"]


def test_if_a_rank_cannot_write_there_is_no_checkpoint(found: list[Any]) -> None:
    words = "rank 1 could not write its shards: [Errno 28] No space left on device"
    for rank in RANKS:
        error, left = found[rank]["no_space_on_rank_1"]
        assert words in error
        assert left == []
    assert found[0]["no_space_on_rank_1"][0].startswith("CheckpointSaveError: could not save")


def test_a_folder_that_is_not_shared_raises_before_training(found: list[Any]) -> None:
    for rank in RANKS:
        error, left, began = found[rank]["private_folders"]
        assert error.startswith("UnsupportedError: FSDP2Strategy(sharded_checkpoints=True) ")
        assert "(rank 0: found; rank 1: not found)" in error
        assert left == []
        assert not began


def plain(folder: Path) -> tuple[Checkpointer, dict[str, Any]]:
    """Returns a Checkpointer and its objects in one process, with other weights."""
    torch.manual_seed(9)
    net, tied = writers.Net(), writers.Tied()
    optimizer = torch.optim.Adam([*net.parameters(), *tied.parameters()], 0.5)
    objects = {"net": net, "tied": tied, "optimizer": optimizer}
    return Checkpointer(folder, objects), objects


def test_one_process_recovers_it(folder: Path, saved: Path) -> None:
    checkpointer, objects = plain(saved)
    recovered = checkpointer.recover_if_possible()
    assert recovered is not None
    assert recovered.path.name == "CKPT+window"
    assert recovered.meta["WER"] == 1.5
    states = {name: obj.state_dict() for name, obj in objects.items()}
    assert same(states, whole(folder, "window"))
    mean = average_checkpoints([recovered, recovered], "net")
    assert same(mean, whole(folder, "window")["net"])
    checkpointer.delete_checkpoints(num_to_keep=1)
    assert [path.name for path in saved.glob("*CKPT*")] == ["CKPT+window"]


@pytest.mark.parametrize("file", ["__1_0.distcp", ".metadata", "structure.pt"])
@pytest.mark.parametrize("is_cut", [True, False])
def test_a_damaged_one_is_skipped(
    saved: Path, caplog: pytest.LogCaptureFixture, file: str, is_cut: bool
) -> None:
    path = saved / "CKPT+window" / "net.ckpt" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content[:-9] if is_cut else content)
    recovered = plain(saved)[0].recover_if_possible()
    assert recovered is not None
    assert recovered.path.name == "CKPT+end"
    reason = f"{path} has " if is_cut else f"{path} was changed since it was saved"
    assert f"{saved / 'CKPT+window'} is skipped: {reason}" in caplog.text
    checkpointer = plain(saved)[0]
    checkpointer.delete_checkpoints(num_to_keep=1)
    assert [each.path.name for each in checkpointer.list_checkpoints()] == ["CKPT+end"]


def test_a_file_that_would_run_code_is_not_loaded(saved: Path) -> None:
    metadata = saved / "CKPT+window" / "net.ckpt" / ".metadata"
    metadata.write_bytes(pickle.dumps(nn.Linear))
    (saved / "CKPT+window" / CHECKSUMS).unlink()
    checkpointer, _ = plain(saved)
    newest = checkpointer.find_checkpoint()
    assert newest is not None
    with pytest.raises(UnsafeCheckpointError, match=r"would run torch\.nn"):
        checkpointer.load_checkpoint(newest)
    metadata.write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match="metadata cannot be read"):
        checkpointer.load_checkpoint(newest)


@pytest.mark.parametrize("row", ["straight", "end_copies"])
def test_convert_writes_the_checkpoint_without_shards(
    folder: Path, tmp_path: Path, row: str
) -> None:
    expected = folder / row / "CKPT+window_whole"
    written = convert(str(folder / row / "CKPT+window"), str(tmp_path / "CKPT+whole"))
    assert {path.name for path in written.iterdir()} == {p.name for p in expected.iterdir()}
    # CKPT.yaml has the time of the save. A tied weight is saved once, as under DDP.
    for path in {p.name for p in expected.iterdir()} - {"CKPT.yaml", CHECKSUMS, "tied.ckpt"}:
        assert (written / path).read_bytes() == (expected / path).read_bytes(), path
    tied = torch.load(written / "tied.ckpt")
    assert same(tied, torch.load(expected / "tied.ckpt"))
    assert tied["one.weight"].data_ptr() == tied["other.weight"].data_ptr()
    # SpeechBrain's own Checkpointer loads the converted checkpoint.
    _, objects = plain(tmp_path / "another")
    recovered = SpeechBrainCheckpointer(tmp_path, objects).recover_if_possible()
    assert recovered.path == written
    assert same(objects["net"].state_dict(), torch.load(written / "net.ckpt"))


def test_convert_writes_a_lightning_checkpoint(folder: Path, tmp_path: Path) -> None:
    written = [
        convert(str(folder / "straight" / f"CKPT+{name}"), str(tmp_path / f"{name}.ckpt"))
        for name in ("end", "end_whole")
    ]
    one, other = (torch.load(path, weights_only=False) for path in written)
    assert same(one["state_dict"], other["state_dict"])
    assert same(one["optimizer_states"], other["optimizer_states"])
    assert one["brain_lightning"].keys() == other["brain_lightning"].keys()
    assert one["brain_lightning"]["files"] == other["brain_lightning"]["files"]


def refusal(brain: Any) -> str:
    brain._lightning.sharding = Sharding(sharded_checkpoints=True)
    with TemporaryAttributes() as temporary, pytest.raises(UnsupportedError) as raised:
        reconcile_sharded_checkpoints(brain, temporary)
    return str(raised.value)


def test_unsupported_checkpointers_raise(tmp_path: Path) -> None:
    option = "FSDP2Strategy(sharded_checkpoints=True)"
    assert refusal(make()).startswith(f"{option} has no effect without a checkpointer.")
    theirs = make(checkpointer=SpeechBrainCheckpointer(tmp_path))
    assert refusal(theirs).startswith(f"{option} needs a brain_lightning.Checkpointer, but")
    in_background = make(checkpointer=Checkpointer(tmp_path), async_save=True)
    assert refusal(in_background).startswith(f"async_save and {option} cannot be used")


def test_checksums_of_shards_are_taken_by_the_process_that_wrote_them(tmp_path: Path) -> None:
    part = tmp_path / "net.ckpt"
    part.mkdir()
    (part / "__0_0.distcp").write_text("shards")
    write_checksums_together(part, part.iterdir())
    (part / "__0_0.distcp").write_text("broken")
    write_checksums(tmp_path)
    with pytest.raises(CheckpointError, match="was changed since it was saved"):
        check(tmp_path)
    assert not (part / CHECKSUMS).exists()
