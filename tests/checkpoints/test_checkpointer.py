"""The Checkpointer: SpeechBrain's API and files; saves that are whole or not there."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
import torch
from speechbrain.utils.checkpoints import Checkpointer as SpeechBrainCheckpointer
from torch import nn

from brain_lightning import (
    Checkpointer,
    CheckpointError,
    CheckpointSaveError,
    EpochCounter,
    UnsupportedError,
    average_checkpoints,
)
from brain_lightning.checkpoints import atomic_directory, state_files
from tests.support.brains import Regression, loader, make, weights
from tests.support.processes import check_python
from tests.support.states import State, names, recovered, saved
from tests.system.checkpoint_kills import SETTINGS, kill_saves

GOLDEN = Path(__file__).parents[1] / "support" / "golden"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "save"


# --------------------------------------------------------------------- SpeechBrain's files


def test_a_checkpoint_of_real_speechbrain_is_read() -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text())
    brain, counter = make(opt_class=lambda p: torch.optim.Adam(p, 0.01)), EpochCounter(9)
    brain.init_optimizers()
    recoverables = {
        "model": brain.modules.model, "counter": counter, "brain": brain,
        "optimizer": brain.optimizer,
    }  # fmt: skip
    checkpointer = Checkpointer(GOLDEN / "save", recoverables, allow_partial_load=True)
    found = checkpointer.recover_if_possible(min_key="WER")
    assert found is not None
    assert found.meta["WER"] == expected["WER"]
    assert brain.modules.model.weight.tolist() == expected["weight"]
    first, *_ = brain.optimizer.state_dict()["state"].values()
    assert first["exp_avg"].tolist() == expected["exp_avg"]
    assert (counter.current, brain.optimizer_step) == (
        expected["epoch"], expected["optimizer_step"],
    )  # fmt: skip


def test_it_is_read_without_speechbrain() -> None:
    code = (
        "import sys; sys.modules['speechbrain'] = None\n"
        "import torch; from brain_lightning import Checkpointer\n"
        "model = torch.nn.Linear(4, 2)\n"
        f"Checkpointer({str(GOLDEN / 'save')!r}, {{'model': model}}).recover_if_possible()\n"
        "print(model.bias.tolist())"
    )
    # It imports the package without it: a fork has both.
    found = check_python("-c", code, real=True)
    expected = json.loads((GOLDEN / "expected.json").read_text())
    assert json.loads(found) == expected["bias"]


def test_speechbrain_reads_ours(folder: Path) -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.1, 1.0, cycle_momentum=False)
    objects = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    meta = {"WER": torch.tensor(3.5), "history": [1, 2]}
    Checkpointer(folder, objects).save_checkpoint(meta)
    other = nn.Linear(3, 3)
    other_optimizer = torch.optim.Adam(other.parameters())
    schedule = torch.optim.lr_scheduler.CyclicLR(
        other_optimizer, 0.1, 1.0, cycle_momentum=False
    )
    theirs = SpeechBrainCheckpointer(
        folder, {"model": other, "optimizer": other_optimizer, "scheduler": schedule}
    )
    found = theirs.recover_if_possible(min_key="WER")
    assert found.meta["WER"] == 3.5
    assert torch.equal(other.weight, model.weight)
    assert str(other_optimizer.state_dict()) == str(optimizer.state_dict())
    theirs.save_and_keep_only({"WER": 1.0})
    assert len(Checkpointer(folder, objects).list_checkpoints()) == 1


def test_a_brain_trains_with_ours_as_with_speechbrains(tmp_path: Path) -> None:
    class Saves(Regression):
        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            if stage.name == "VALID":
                self.checkpointer.save_and_keep_only({"loss": stage_loss}, min_keys=["loss"])

    results = []
    for cls in (Checkpointer, SpeechBrainCheckpointer):
        for _ in range(2):
            counter = EpochCounter(3)
            checkpointer = cls(tmp_path / cls.__module__, {"counter": counter})
            brain = make(Saves, checkpointer=checkpointer, hparams={"counter": counter})
            checkpointer.add_recoverable("model", brain.modules.model)
            brain.fit(counter, loader(), loader())
            results.append((brain.evaluate(loader(), min_key="loss"), brain.optimizer_step))
    assert results[0] == results[1] == results[2] == results[3]
    assert results[0][1] == 15


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
    """Copies of a folder before each operation on files in it, as if a kill came then.

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
    """With copies of the second save."""
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
    """One bit, in the numbers of a file of torch's; its padding is of no importance."""
    data = bytearray(path.read_bytes())
    position = len(data) // 2
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = [name for name in archive.namelist() if "data" in name]
            # Stored as they are: torch does not compress.
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
        # As one that SpeechBrain wrote: what is in it is whole.
        assert values == {2.0}
        return
    assert values == {1.0}
    told = "CKPT+2" in caplog.text and "skipped" in caplog.text
    # Without its meta file a directory is no checkpoint, for SpeechBrain too.
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
    """It has no checksums but those within torch's files."""
    saved(folder, 1, 2)
    for name in ("CKPT+1", "CKPT+2"):
        (folder / name / "checksums.yaml").unlink()
    damage(folder / "CKPT+2" / file)
    assert recovered(folder) == {1.0}


def test_no_fresh_start_where_every_checkpoint_is_damaged(folder: Path) -> None:
    saved(folder, 1)
    flip(folder / "CKPT+1" / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged: move them"):
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
    assert "model has a parameter that is not finite" in caplog.text
    assert names(folder) == {"CKPT+1"}
    assert recovered(folder) == {1.0}


def test_numbers_whose_sum_overflows_are_finite() -> None:
    model = nn.Linear(2, 1)
    model.weight.data.fill_(3e38)
    model.register_buffer("mask", torch.tensor(-torch.inf))
    assert state_files.is_finite(model)


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
        # The worker: until the test closes its end.
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.waitpid(trainer, 0)
    assert len(names(folder)) == 2
    assert recovered(folder) == {1.0}
    assert names(folder) == {"CKPT+1"}
    os.close(writer)
    os.close(reader)


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


def fails_to_write(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("async_save", [False, True])
def test_a_save_that_fails_leaves_the_earlier_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch, async_save: bool
) -> None:
    state = saved(folder, 1)
    state.checkpointer.async_save = async_save
    monkeypatch.setattr(torch, "save", fails_to_write)
    with pytest.raises(
        CheckpointSaveError, match=r"MiB free\).*No space left on device.*as they"
    ):
        save_and_wait(state)
    monkeypatch.undo()
    assert names(folder) == {"CKPT+1"}
    assert recovered(folder) == {1.0}


def save_and_wait(state: State) -> None:
    state.checkpointer.save_checkpoint()
    state.checkpointer.wait()


def test_a_disk_that_is_full_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    """A tmpfs of one MiB, in a mount namespace of its own."""
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

    # Not by its mode: a test that runs as root may write anywhere.
    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(OSError, match="Permission denied"):
        state.checkpointer.save_checkpoint()
    monkeypatch.undo()
    assert recovered(folder) == {1.0}


# --------------------------------------------------------------------- in the background


def test_a_save_in_the_background_holds_what_was_there_when_it_was_asked_for(
    folder: Path,
) -> None:
    state = State(folder, size=8)
    state.checkpointer.async_save = True
    for value in range(5):
        state.set(value)
        checkpoint = state.checkpointer.save_checkpoint({"value": value})
        state.set(99)
    assert checkpoint is not None
    found = state.checkpointer.find_checkpoints()
    assert [each.meta["value"] for each in found] == [4, 3, 2, 1, 0]
    assert found[0] == checkpoint
    for each in found:
        state.checkpointer.load_checkpoint(each)
        assert state.values() == {float(each.meta["value"])}


def test_an_error_in_the_background_surfaces_at_the_next_save(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = saved(folder, 1)
    state.checkpointer.async_save = True
    monkeypatch.setattr(torch, "save", fails_to_write)
    state.checkpointer.save_checkpoint()
    futures.wait([state.checkpointer._pending])
    with pytest.raises(CheckpointSaveError, match="No space left"):
        state.checkpointer.save_checkpoint()


def test_an_error_in_the_background_surfaces_at_the_end_of_a_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SavesLast(Regression):
        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            monkeypatch.setattr(torch, "save", fails_to_write)
            self.checkpointer.save_checkpoint()

    brain = make(SavesLast, checkpointer=Checkpointer(folder), async_save=True)
    assert brain.checkpointer.async_save
    with pytest.raises(CheckpointSaveError, match="No space left"):
        brain.fit(range(1), loader())


def test_a_process_ends_when_its_last_save_is_durable(folder: Path) -> None:
    code = (
        "import torch; from brain_lightning import Checkpointer\n"
        "model = torch.nn.Linear(2000, 500)\n"
        f"checkpointer = Checkpointer({str(folder)!r}, {{'model': model}})\n"
        "checkpointer.async_save = True\n"
        "for value in range(3): checkpointer.save_checkpoint({'value': value})\n"
    )
    check_python("-c", code)
    model = nn.Linear(2000, 500)
    found = Checkpointer(folder, {"model": model}).recover_if_possible()
    assert found is not None
    assert found.meta["value"] == 2


def test_async_save_needs_our_checkpointer(folder: Path) -> None:
    theirs = SpeechBrainCheckpointer(folder)
    with pytest.raises(UnsupportedError, match="async_save needs"):
        make(checkpointer=theirs, async_save=True)


# --------------------------------------------------------------------- finding and loading


def test_a_recoverable_that_is_not_in_the_checkpoint(folder: Path) -> None:
    state = saved(folder, 1)
    state.checkpointer.add_recoverable("other", nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match=r"no file for 'other'.*allow_partial"):
        state.checkpointer.recover_if_possible()
    state.checkpointer.add_recoverable("other", nn.Linear(1, 1), optional_load=True)
    with pytest.warns(UserWarning, match="no file for 'other': it is left as it is"):
        assert state.checkpointer.recover_if_possible() is not None


def test_an_object_without_hooks_is_told_before_anything_is_written(folder: Path) -> None:
    checkpointer = Checkpointer(folder, {"thing": object()})
    with pytest.raises(CheckpointError, match="no way to save 'thing', a object"):
        checkpointer.save_checkpoint()
    assert not list(folder.iterdir())


def test_keys_exclude_each_other(folder: Path) -> None:
    with pytest.raises(ValueError, match="max_key='a' and min_key='b' exclude each other"):
        Checkpointer(folder).find_checkpoint(max_key="a", min_key="b")


def test_anything_with_a_state_dict_is_saved(folder: Path) -> None:
    class Thing:
        value = 1

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.value = state["value"]

    thing = Thing()
    thing.value = 5
    checkpointer = Checkpointer(folder, {"thing": thing})
    checkpointer.save_checkpoint()
    thing.value = 7
    checkpointer.recover_if_possible()
    assert thing.value == 5


def test_checkpoints_are_averaged(folder: Path) -> None:
    state = saved(folder, 1, 2, 6)
    found = state.checkpointer.find_checkpoints(max_num_checkpoints=2)
    assert average_checkpoints(found, "model")["weight"].unique().tolist() == [4.0]


def test_weights_move_where_a_run_is_resumed(folder: Path) -> None:
    first = make(checkpointer=Checkpointer(folder))
    first.checkpointer.add_recoverable("model", first.modules.model)
    first.fit(range(2), loader())
    first.checkpointer.save_checkpoint()
    second = make(checkpointer=Checkpointer(folder))
    second.checkpointer.add_recoverable("model", second.modules.model)
    before = weights(second)
    second.on_fit_start()
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))
    assert not torch.equal(before[0], weights(second)[0])
    assert second.optimizer_step == 10


def test_what_is_done_is_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        state = saved(folder, 1)
        state.checkpointer.recover_if_possible()
    assert f"Saved an end-of-epoch checkpoint in {folder / 'CKPT+1'}" in caplog.text
    assert f"Loading a checkpoint from {folder / 'CKPT+1'}" in caplog.text
