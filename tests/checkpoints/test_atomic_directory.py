"""Atomic saves: kills, full disks, damaged files, several processes."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from brain_lightning import (
    Checkpointer,
    CheckpointError,
    CheckpointSaveError,
)
from brain_lightning.checkpoints import atomic_directory, state_files
from tests.support.processes import check_python
from tests.support.states import State, fails_to_write, names, recovered, saved
from tests.system.checkpoint_kills import SETTINGS, kill_saves


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "save"


# ---------------------------------------------------------------- what a save leaves behind


def test_nothing_but_the_checkpoint_is_left(folder: Path) -> None:
    state = State(folder, size=8)
    for value in range(3):
        state.set(value)
        state.checkpointer.save_and_keep_only()
    (left,) = folder.iterdir()
    assert names(left) == {
        "CKPT.yaml", "model.ckpt", "optimizer.ckpt", "counter.ckpt", "checksums.yaml"
    }  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.filterwarnings("ignore:This process")  # torch: a fork of a process with threads
def test_a_process_that_is_killed_in_a_save_loses_nothing(
    folder: Path, setting: dict[str, Any]
) -> None:
    outcome = kill_saves(folder, 8, seed=5, **setting)
    assert outcome.clean, outcome


class Prefixes:
    """Copies a folder before each file operation in it, as if the process was killed then.

    Python cannot remove the hook: it is for a process that ends.
    """

    def __init__(self, folder: Path, copies: Path) -> None:
        self.folder, self.copies, self.on = folder, copies, False
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        operations = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")
        if self.on and event in operations and str(self.folder) in str(arguments[0]):
            self.take()

    def take(self) -> None:
        import shutil

        self.on = False
        target = self.copies / f"{len(list(self.copies.iterdir())):03d}"
        shutil.copytree(self.folder, target)
        self.on = True


def save_twice(folder: Path, copies: Path, name: str | None) -> None:
    """Saves twice. Copies the folder before each file operation of the second save."""
    state = State(folder, size=8)
    state.set(1)
    state.checkpointer.save_checkpoint(name=name)
    state.set(2)
    prefixes = Prefixes(folder, copies)
    prefixes.on = True
    state.checkpointer.save_and_keep_only(name=name)


@pytest.mark.parametrize("name", [None, "latest"])
def test_every_prefix_of_a_saves_operations_can_be_recovered(
    tmp_path: Path, name: str | None
) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    context = multiprocessing.get_context("fork")
    saving = context.Process(target=save_twice, args=(tmp_path / "save", copies, name))
    saving.start()
    saving.join()
    assert saving.exitcode == 0
    found = [recovered(copy) for copy in sorted(copies.iterdir())]
    assert len(found) > 10
    assert found[0] == {1.0}
    assert found[-1] == {2.0}
    switches = [index for index, values in enumerate(found) if values == {2.0}]
    assert found == [{1.0}] * switches[0] + [{2.0}] * len(switches)


# ------------------------------------------------------------------------------- faults


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    """Flips one bit in the numbers of a torch file, and not in its padding."""
    data = bytearray(path.read_bytes())
    position = len(data) // 2
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = [name for name in archive.namelist() if "data" in name]
            # The numbers are stored unchanged, because torch does not compress.
            position = data.find(archive.read(parts[-1]))
    data[position] ^= 4
    path.write_bytes(data)


DAMAGE: list[Callable[[Path], None]] = [cut, empty, Path.unlink, flip]
FILES = ["CKPT.yaml", "model.ckpt", "optimizer.ckpt", "counter.ckpt", "checksums.yaml"]


@pytest.mark.parametrize("damage", DAMAGE, ids=["cut", "empty", "missing", "flipped"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_newest_checkpoint_is_skipped_for_the_one_before(
    folder: Path, file: str, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    saved(folder, 1, 2)
    damage(folder / "CKPT+2" / file)
    values = recovered(folder)
    if file == "checksums.yaml" and damage is Path.unlink:
        # Like a checkpoint of SpeechBrain, whose files are intact.
        assert values == {2.0}
        return
    assert values == {1.0}
    told = "CKPT+2" in caplog.text and "skipped" in caplog.text
    # Without a meta file a directory is not a checkpoint, as in SpeechBrain.
    assert told or (file == "CKPT.yaml" and damage is Path.unlink)


@pytest.mark.parametrize("damage", DAMAGE, ids=["cut", "empty", "missing", "flipped"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_old_checkpoint_never_blocks(folder: Path, file: str, damage: Any) -> None:
    state = saved(folder, 1, 2)
    damage(folder / "CKPT+1" / file)
    assert recovered(folder) == {2.0}
    state.checkpointer.save_and_keep_only()
    assert recovered(folder) == {2.0}


@pytest.mark.parametrize("damage", [cut, empty, flip], ids=["cut", "empty", "flipped"])
@pytest.mark.parametrize("file", ["model.ckpt", "optimizer.ckpt"])
def test_damage_to_a_checkpoint_of_speechbrains_is_found_too(
    folder: Path, file: str, damage: Any
) -> None:
    """A checkpoint without checksums, except those within torch's files."""
    saved(folder, 1, 2)
    for name in ("CKPT+1", "CKPT+2"):
        (folder / name / "checksums.yaml").unlink()
    damage(folder / "CKPT+2" / file)
    assert recovered(folder) == {1.0}


def test_no_fresh_start_where_every_checkpoint_is_damaged(folder: Path) -> None:
    saved(folder, 1)
    flip(folder / "CKPT+1" / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged\. To start"):
        recovered(folder)


def test_nothing_is_changed_before_everything_was_read(folder: Path) -> None:
    state = saved(folder, 1)
    flip(folder / "CKPT+1" / "counter.ckpt")
    state.set(7)
    (checkpoint,) = state.checkpointer.list_checkpoints()
    with pytest.raises(CheckpointError, match=r"counter\.ckpt was changed since it was saved"):
        state.checkpointer.load_checkpoint(checkpoint)
    assert state.values() == {7.0}


def test_a_checkpoint_that_is_cut_short_is_not_kept_in_the_place_of_a_good_one(
    folder: Path,
) -> None:
    state = saved(folder, 1, 2)
    cut(folder / "CKPT+2" / "model.ckpt")
    state.checkpointer.delete_checkpoints(num_to_keep=1)
    assert names(folder) == {"CKPT+1"}


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def test_a_file_that_would_run_code_is_refused(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = saved(folder, 1)
    state.checkpointer.custom_save_hooks["optimizer"] = lambda _, path: torch.save(
        {"state": Evil()}, path
    )
    state.checkpointer.save_checkpoint(name="2")
    assert recovered(folder) == {1.0}
    assert "would run code when loaded" in caplog.text
    assert not Path("executed").exists()


def test_a_meta_file_that_would_run_code_is_refused(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(folder, 1, 2)
    meta = folder / "CKPT+2" / "CKPT.yaml"
    meta.write_text("x: !!python/object/apply:os.mkdir [executed]\n" + meta.read_text())
    assert recovered(folder) == {1.0}
    assert "CKPT+2 is skipped" in caplog.text
    assert not Path("executed").exists()


def test_a_state_that_is_not_finite_is_not_saved_over_a_good_one(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = saved(folder, 1)
    state.model.weight.data[0, 3] = torch.inf
    assert state.checkpointer.save_checkpoint() is None
    state.checkpointer.save_and_keep_only()
    assert "because parameters of model are not finite" in caplog.text
    assert names(folder) == {"CKPT+1"}
    assert recovered(folder) == {1.0}


def test_numbers_whose_sum_overflows_are_finite() -> None:
    model = nn.Linear(2, 1)
    model.weight.data.fill_(3e38)
    model.register_buffer("mask", torch.tensor(-torch.inf))
    assert state_files.not_finite({"model": model}) == []


def test_a_clock_that_is_set_back_does_not_make_the_newest_an_old_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(folder, 1)
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    state = State(folder, size=8)
    state.set(2)
    state.checkpointer.save_checkpoint()
    assert recovered(folder) == {2.0}


def test_what_dead_processes_left_is_removed_and_the_living_ones_is_not(
    folder: Path,
) -> None:
    state = saved(folder, 1)
    code = (
        "from pathlib import Path\n"
        "from brain_lightning.checkpoints.atomic_directory import new_directory\n"
        f"print(new_directory(Path({str(folder)!r})).name)"
    )
    dead, mine = check_python("-c", code).strip(), atomic_directory.new_directory(folder).name
    assert {dead, mine} <= names(folder)
    assert recovered(folder) == {1.0}
    assert names(folder) == {"CKPT+1", mine}
    assert state.checkpointer.list_checkpoints()[0].path.name == "CKPT+1"


@pytest.mark.filterwarnings("ignore:This process")  # torch: a fork of a process with threads
def test_the_directory_of_a_save_is_left_alone_by_other_processes(folder: Path) -> None:
    saved(folder, 1)
    mine = atomic_directory.new_directory(folder)
    process = multiprocessing.get_context("fork").Process(target=recovered, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert names(folder) == {"CKPT+1", mine.name}
    with pytest.raises(ZeroDivisionError), atomic_directory.removed_on_failure(mine):
        raise ZeroDivisionError
    assert mine not in atomic_directory._locks


@pytest.mark.filterwarnings("ignore:This process")  # torch: a fork of a process with threads
def test_a_worker_that_outlives_its_trainer_keeps_no_lock(folder: Path) -> None:
    saved(folder, 1)
    reader, writer = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        atomic_directory.new_directory(folder)
        if os.fork():
            os._exit(0)
        # The worker waits until the test closes its end of the pipe.
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.waitpid(trainer, 0)
    assert len(names(folder)) == 2
    assert recovered(folder) == {1.0}
    assert names(folder) == {"CKPT+1"}
    os.close(writer)
    os.close(reader)


def test_a_directory_that_was_made_again_is_another_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process opens a directory that was removed and created again by its owner."""
    saved(folder, 1)
    mine = atomic_directory.new_directory(folder)
    atomic_directory._unlock_all()
    opened = atomic_directory._is_abandoned

    def made_again_meanwhile(path: Path, *args: Any) -> bool:
        path.rmdir()
        path.mkdir()
        return opened(path, *args)

    monkeypatch.setattr(atomic_directory, "_is_abandoned", made_again_meanwhile)
    assert recovered(folder) == {1.0}
    assert names(folder) == {"CKPT+1", mine.name}


@pytest.mark.filterwarnings("ignore:This process")  # torch: a fork of a process with threads
def test_two_processes_that_save_at_once_get_a_checkpoint_each(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    processes = [context.Process(target=save_five, args=(folder, start)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(Checkpointer(folder).list_checkpoints()) == 10
    assert recovered(folder) == {4.0}


def save_five(folder: Path, start: Any) -> None:
    state = State(folder, size=8)
    start.wait()
    for value in range(5):
        state.set(value)
        state.checkpointer.save_checkpoint()


@pytest.mark.parametrize("async_save", [False, True])
def test_a_save_that_fails_leaves_the_earlier_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch, async_save: bool
) -> None:
    state = saved(folder, 1)
    state.checkpointer.async_save = async_save
    monkeypatch.setattr(torch, "save", fails_to_write)
    with pytest.raises(
        CheckpointSaveError, match=r"MiB free\).*No space left on device.*unchanged"
    ):
        save_and_wait(state)
    monkeypatch.undo()
    assert names(folder) == {"CKPT+1"}
    assert recovered(folder) == {1.0}


def save_and_wait(state: State) -> None:
    state.checkpointer.save_checkpoint()
    state.checkpointer.wait()


def test_a_disk_that_is_full_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    """Runs on a tmpfs of 1 MiB, in a separate mount namespace."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.support.states import State
folder = Path({str(tmp_path)!r}) / "small"
state = State(folder, size=150_000)
state.set(1)
state.checkpointer.save_checkpoint()
state.set(2)
try:
    state.checkpointer.save_checkpoint()
except OSError as error:
    print(type(error).__name__, len(list(folder.iterdir())))
state.checkpointer.recover_if_possible()
print(state.values())
"""
    (tmp_path / "small").mkdir()
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}/small && exec {sys.executable} -c "
    done = subprocess.run(
        ["/usr/bin/unshare", "--mount", "sh", "-c", mount + '"$0"', code],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    assert done.stdout.splitlines() == ["CheckpointSaveError 1", "{1.0}"], done.stderr


def test_a_folder_that_is_read_only_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = saved(folder, 1)

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    # File modes have no effect if the test runs as root.
    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(OSError, match="Permission denied"):
        state.checkpointer.save_checkpoint()
    monkeypatch.undo()
    assert recovered(folder) == {1.0}
