"""Regression tests: counterexamples in the Checkpointer that were found and fixed."""

from __future__ import annotations

import fcntl
import logging
import os
import random
import socket
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from speechbrain.utils.checkpoints import Checkpointer as SpeechBrainCheckpointer
from torch import nn

from brain_lightning import (
    Checkpointer,
    CheckpointError,
    CheckpointSaveError,
    UnsupportedError,
)
from brain_lightning.checkpoints import atomic_directory
from brain_lightning.checkpoints.async_save import StateCopies
from brain_lightning.cli.main import main
from tests.support.brains import make
from tests.support.states import State, names, recovered, saved


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "save"


def model_only(folder: Path, model: nn.Module) -> Checkpointer:
    return Checkpointer(folder, {"model": model})


# ------------------------------------------------------------------------- fixed names


@pytest.mark.parametrize("step", ["write_checksums", "_sync"])
def test_a_fixed_name_is_still_there_where_the_disk_is_full(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    state = State(folder, size=8)
    state.set(1)
    state.checkpointer.save_checkpoint(name="latest")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_directory, step, full)
    state.set(2)
    with pytest.raises(CheckpointSaveError, match="No space left"):
        state.checkpointer.save_checkpoint(name="latest")
    monkeypatch.undo()
    assert names(folder) == {"CKPT+latest"}
    assert recovered(folder) == {1.0}


def test_a_fixed_name_that_was_moved_away_on_another_host_is_found(folder: Path) -> None:
    saved(folder, 1)
    moved = "~".join([".replaced", "node7.1", "12", "34", "abcdef01", "CKPT+1"])
    (folder / "CKPT+1").rename(folder / moved)
    assert recovered(folder) == {1.0}
    assert names(folder) == {moved}


def test_what_another_host_left_goes_after_a_day(folder: Path) -> None:
    saved(folder, 1)
    new, old = (folder / f".writing~node7.1~12~34~abcdef0{n}~" for n in (1, 2))
    for path in (new, old):
        path.mkdir()
    os.utime(old, (1e9, 1e9))
    State(folder, size=8)
    assert names(folder) == {"CKPT+1", new.name}


def test_what_version_0_1_0_left_is_found_and_goes_after_a_day(folder: Path) -> None:
    saved(folder, 1)
    owner = f"{socket.gethostname()}.4026531836~4194305~1"
    new, old = (folder / f"{kind}~{owner}~abcdef01~" for kind in (".writing", ".deleted"))
    for path in (new, old):
        path.mkdir()
    os.utime(old, (1e9, 1e9))
    moved = folder / f".replaced~{owner}~abcdef01~CKPT+a~b"
    (folder / "CKPT+1").rename(moved)
    assert recovered(folder) == {1.0}
    assert names(folder) == {new.name, moved.name}
    os.utime(moved, (1e9, 1e9))
    assert recovered(folder) == {1.0}
    assert names(folder) == {new.name, "CKPT+a~b"}


def test_where_there_are_no_locks_only_what_is_old_goes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    saved(folder, 1)
    new, old = (atomic_directory.new_directory(folder) for _ in range(2))
    os.utime(old, (1e9, 1e9))
    assert recovered(folder) == {1.0}
    assert names(folder) == {"CKPT+1", new.name}
    atomic_directory._unlock_all()


def test_a_name_with_a_separator_in_it_comes_back(folder: Path) -> None:
    saved(folder, 1)
    host = socket.gethostname()
    (folder / "CKPT+1").rename(folder / f".replaced~{host}~abcdef01~CKPT+a~b")
    assert recovered(folder) == {1.0}
    assert names(folder) == {"CKPT+a~b"}


@pytest.mark.parametrize("name", [".writing", ".deleted~x", ".writing~host~abc~1~2~3"])
def test_directories_of_other_programs_are_left_alone(folder: Path, name: str) -> None:
    saved(folder, 1)
    (folder / name).mkdir()
    assert recovered(folder) == {1.0}
    assert name in names(folder)


def test_a_name_that_is_no_directorys_is_told(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="name='a/b' is not the name of a directory"):
        saved(folder).checkpointer.save_checkpoint(name="a/b")
    assert not names(folder)


# ------------------------------------------------------------------------------ damage


def test_no_flip_of_a_meta_file_blocks_or_misleads(folder: Path) -> None:
    state = saved(folder, 1)
    state.set(2)
    state.checkpointer.save_checkpoint({"WER": 9.5}, name="2")
    meta = folder / "CKPT+2" / "CKPT.yaml"
    whole = meta.read_bytes()
    for position in range(0, len(whole), 3):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        meta.write_bytes(data)
        assert recovered(folder) == {1.0}, position
    state.checkpointer.save_and_keep_only(min_keys=["WER"])
    assert recovered(folder) == {2.0}


def test_no_flip_of_a_file_of_torchs_crashes_the_recovery(folder: Path) -> None:
    saved(folder, 1, 2)
    path = folder / "CKPT+2" / "model.ckpt"
    whole = path.read_bytes()
    rng = random.Random(3)  # noqa: S311
    for _ in range(150):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        # A flip in the padding of the archive changes nothing.
        assert recovered(folder) in ({1.0}, {2.0})


def test_one_that_is_damaged_in_its_length_is_not_kept_as_the_best(folder: Path) -> None:
    state = State(folder, size=8)
    for value in (1, 2):
        state.set(value)
        state.checkpointer.save_checkpoint({"WER": 3.0 - value}, name=str(value))
    best = folder / "CKPT+2" / "model.ckpt"
    with zipfile.ZipFile(best) as archive:
        numbers = archive.read([n for n in archive.namelist() if "data" in n][-1])
    best.write_bytes(best.read_bytes().replace(numbers, bytes(len(numbers))))
    later = State(folder, size=8)
    later.set(3)
    later.checkpointer.save_and_keep_only({"WER": 5.0}, keep_recent=False, min_keys=["WER"])
    assert names(folder) == {"CKPT+1"}


def test_damaged_meta_alone_is_no_reason_to_start_anew(folder: Path) -> None:
    saved(folder, 1)
    (folder / "CKPT+1" / "CKPT.yaml").write_text("")
    with pytest.raises(CheckpointError, match=r"every checkpoint .* is damaged"):
        recovered(folder)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
@pytest.mark.parametrize("file", ["model.ckpt", "counter.ckpt"])
def test_what_speechbrain_leaves_when_it_is_killed_is_skipped(
    folder: Path, damage: str, file: str
) -> None:
    saved(folder, 1, 2)
    for name in ("CKPT+1", "CKPT+2"):
        (folder / name / "checksums.yaml").unlink()
    path = folder / "CKPT+2" / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else path.read_bytes()[:60])
    # A truncated number is still a number. Only a torch file shows that it is truncated.
    expected = {2.0} if (damage, file) == ("cut", "counter.ckpt") else {1.0}
    assert recovered(folder) == expected


# --------------------------------------------------------------------- what is in a state


class Versioned(nn.Linear):
    """Migrates the states of earlier versions."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, local: Any, *args: Any) -> None:
        if local.get("version") != 2:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] * 10
        super()._load_from_state_dict(state, prefix, local, *args)


@pytest.mark.parametrize("async_save", [False, True])
def test_versions_of_modules_are_kept(folder: Path, async_save: bool) -> None:
    model, other = Versioned(2, 2), Versioned(2, 2)
    checkpointer = model_only(folder, model)
    checkpointer.async_save = async_save
    checkpointer.save_checkpoint()
    checkpointer.wait()
    for cls in (Checkpointer, SpeechBrainCheckpointer):
        cls(folder, {"model": other}).recover_if_possible()
        assert torch.equal(model.weight, other.weight)


class Strange:
    """Has a state with other values than tensors."""

    def __init__(self) -> None:
        self.array, self.counts = np.ones(3), Counter(a=1)

    def state_dict(self) -> dict[str, Any]:
        return {"array": self.array, "counts": self.counts, "list": [self.array]}


def test_a_copy_is_one_of_everything() -> None:
    strange = Strange()
    copy = StateCopies().take(strange.state_dict())
    strange.array[:], strange.counts["a"] = 7, 7
    assert copy["array"].tolist() == copy["list"][0].tolist() == [1, 1, 1]
    assert copy["counts"] == {"a": 1}


def test_shared_parameters_are_copied_once_and_memory_is_used_again() -> None:
    tied = nn.ModuleDict({"a": nn.Linear(50, 50), "b": nn.Linear(50, 50)})
    tied["b"].weight = tied["a"].weight
    tied.register_buffer("strided", torch.zeros(10, 20)[:, ::2])
    copies = StateCopies()
    for _ in range(4):
        state = copies.take(tied.state_dict())
        copies.recycle()
    assert state["a.weight"].data_ptr() == state["b.weight"].data_ptr()
    held = sum(len(buffers) for buffers in copies._free.values())
    assert held == len({t.data_ptr() for t in tied.state_dict().values()})
    tied.register_buffer("larger", torch.zeros(9))
    copies.take(tied.state_dict())
    copies.recycle()
    assert sum(len(buffers) for buffers in copies._free.values()) == held + 1


def test_a_first_save_in_inference_mode_does_not_spoil_the_next(folder: Path) -> None:
    model = nn.Linear(2, 2)
    checkpointer = model_only(folder, model)
    checkpointer.async_save = True
    with torch.inference_mode():
        checkpointer.save_checkpoint()
    checkpointer.save_checkpoint()
    assert len(checkpointer.list_checkpoints()) == 2


def test_a_mask_in_a_frozen_parameter_and_small_floats_are_saved(folder: Path) -> None:
    model = nn.Module()
    model.mask = nn.Parameter(torch.full((2,), -torch.inf), requires_grad=False)
    model.small = nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn))
    assert model_only(folder, model).save_checkpoint() is not None


# -------------------------------------------------------------------- what else is asked for


def test_a_script_may_change_directory_while_it_saves(tmp_path: Path) -> None:
    here = Path.cwd()
    os.chdir(tmp_path)
    checkpointer = Checkpointer("save", {"model": nn.Linear(2, 2)})
    checkpointer.async_save = True
    checkpointer.save_and_keep_only()
    os.chdir(here)
    checkpointer.wait()
    assert len(names(tmp_path / "save")) == 1


def test_an_error_in_the_background_is_logged_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = model_only(folder, nn.Linear(2, 2))
    checkpointer.async_save = True
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with caplog.at_level(logging.ERROR):
        checkpointer.save_checkpoint()
        with pytest.raises(CheckpointSaveError):
            checkpointer.wait()
    assert "Could not save a checkpoint in the background" in caplog.text


def test_async_save_without_a_checkpointer_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="async_save has no effect without a"):
        make(async_save=True)


def test_a_hook_may_write_a_directory(folder: Path) -> None:
    def save(_: object, path: Path) -> None:
        path.mkdir()
        (path / "inner.txt").write_text("5")

    def load(thing: list[str], path: Path, end_of_epoch: bool) -> None:
        thing.append((path / "inner.txt").read_text())

    thing: list[str] = []
    checkpointer = Checkpointer(folder, {"thing": thing}, {"thing": load}, {"thing": save})
    checkpointer.save_and_keep_only(max_keys=None, min_keys=None)  # type: ignore[arg-type]
    checkpointer.recover_if_possible()
    assert thing == ["5"]
    inner = next(folder.glob("*/thing.ckpt/inner.txt"))
    inner.write_text("6")
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpointer.recover_if_possible()


def test_meta_of_other_libraries_is_read_by_speechbrain(folder: Path) -> None:
    meta = {
        "tensor": torch.tensor([1.0, 2.0]), "array": np.array([1, 2]), "number": np.float32(2),
        "path": Path("x"), "tuple": (1, 2), "nested": {"a": torch.tensor(3)}, "none": None,
    }  # fmt: skip
    model = nn.Linear(2, 2)
    ours = model_only(folder, model)
    ours.save_checkpoint(meta)
    (theirs,) = SpeechBrainCheckpointer(folder, {"model": model}).list_checkpoints()
    plain = {
        "tensor": [1.0, 2.0], "array": [1, 2], "number": 2.0, "path": "x", "tuple": [1, 2],
        "nested": {"a": 3}, "none": None,
    }  # fmt: skip
    assert {name: theirs.meta[name] for name in plain} == plain
    (mine,) = ours.list_checkpoints()
    assert torch.equal(mine.meta["tensor"], meta["tensor"])


def test_a_folder_that_was_removed_is_made_again(folder: Path) -> None:
    checkpointer = model_only(folder, nn.Linear(2, 2))
    folder.rmdir()
    assert checkpointer.list_checkpoints() == []
    checkpointer.save_checkpoint()
    assert len(names(folder)) == 1


def test_names_with_dots_are_told_apart_where_they_are_converted(folder: Path) -> None:
    outer = nn.ModuleDict({"b": nn.Linear(2, 2)})
    objects = {"a": outer, "a.b": nn.Linear(2, 2)}
    Checkpointer(folder, objects).save_checkpoint(name="run")
    out, back = folder.parent / "x.ckpt", folder.parent / "back" / "CKPT+back"
    assert main(["convert", str(folder), str(out)]) == 0
    assert main(["convert", str(out), str(back)]) == 0
    for name in objects:
        one, other = (torch.load(d / f"{name}.ckpt") for d in (folder / "CKPT+run", back))
        assert list(one) == list(other)
