"""Directories that are there whole or not at all, and a look at whether they still are.

A checkpoint is written beside its final place, made durable, and renamed. What a
process that died has left behind is found by its name and cleaned up.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import threading
import time
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from brain_lightning.errors import CheckpointError, CheckpointSaveError

CKPT_PREFIX = "CKPT"
METAFNAME = f"{CKPT_PREFIX}.yaml"
PARAMFILE_EXT = ".ckpt"
# What each file should be, to notice damage; SpeechBrain neither writes nor minds it.
CHECKSUMS = "checksums.yaml"
# Names of directories that are no checkpoint: yet, or any more.
WRITING, REPLACED, DELETED = ".writing", ".replaced", ".deleted"
SEPARATOR = "~"
# Seconds between two looks at what is to be made durable.
SYNC_EVERY = 0.02
A_DAY = 24 * 60 * 60


# ------------------------------------------------------------------------------ writing


def _owned_name(kind: str, name: str = "") -> str:
    """A name that says which process it belongs to; its start tells it from a later one."""
    pid = os.getpid()
    owner = (_machine(), str(pid), _start_of(pid))
    return SEPARATOR.join([kind, *owner, uuid.uuid4().hex[:8], name])


def _machine() -> str:
    """Where a process number means something: a host, and the container in it."""
    try:
        container = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        container = ""
    return f"{socket.gethostname()}.{container}"


def _start_of(pid: int) -> str:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return "?"
    return status.rpartition(")")[2].split()[19]


def new_directory(parent: Path) -> Path:
    """Makes the directory that a checkpoint is written to.

    Args:
        parent: Where the checkpoint will be: a rename cannot leave the file system.

    Returns:
        An empty directory, which no reader takes for a checkpoint.
    """
    path = parent / _owned_name(WRITING)
    with removed_on_failure(path):
        parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()
    return path


@contextmanager
def removed_on_failure(directory: Path) -> Iterator[None]:
    """Leaves nothing half-written behind, and says what failed.

    Args:
        directory: What ``new_directory`` made.

    Raises:
        CheckpointSaveError: Something within could not be written.
    """
    try:
        yield
    except BaseException as error:
        shutil.rmtree(directory, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, CheckpointSaveError):
            raise CheckpointSaveError(
                f"no checkpoint was saved in {directory.parent}{_free(directory.parent)}: "
                f"{error}. The earlier ones are as they were"
            ) from error
        raise


def _free(directory: Path) -> str:
    try:
        return f" ({shutil.disk_usage(directory).free / 2**20:.0f} MiB free)"
    except OSError:
        return ""


@contextmanager
def syncing(directory: Path) -> Iterator[None]:
    """Makes files durable while they are written, rather than all of them at the end.

    A disk is as slow as writing to memory is fast: done one after the other, a save
    of 400 MB takes half as long again.

    Args:
        directory: What ``new_directory`` made.
    """
    done = threading.Event()

    def sync_until_done() -> None:
        while not done.wait(SYNC_EVERY):
            for path in directory.glob(f"*{PARAMFILE_EXT}"):
                # What fails here fails again in `publish`, which tells.
                with suppress(OSError):
                    _sync(path)

    thread = threading.Thread(target=sync_until_done, name="checkpoint sync")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def publish(directory: Path, final: Path) -> Path:
    """Makes a directory durable and gives it its name, in one step.

    Args:
        directory: What ``new_directory`` made, with everything in it.
        final: The name that it is to have.

    Returns:
        Where it is: ``final``, or the next number where another process was faster.
    """
    _make_durable(directory)
    while True:
        try:
            os.rename(directory, final)
            break
        except OSError:
            if not final.exists():
                raise
            final = _after(final)
    _sync(final.parent)
    return final


def publish_in_place_of(directory: Path, final: Path) -> Path:
    """As ``publish``, for a name of one's own that may be taken already.

    Args:
        directory: What ``new_directory`` made, with everything in it.
        final: The name; a checkpoint that has it is there until the new one is.

    Returns:
        ``final``.
    """
    _make_durable(directory)
    while True:
        old = final.parent / _owned_name(REPLACED, final.name)
        with suppress(FileNotFoundError):
            # Until the next rename the old one is found under this name: see `in_force`.
            os.rename(final, old)
        try:
            os.rename(directory, final)
            break
        except OSError:
            if old.exists() and not final.exists():
                os.rename(old, final)
                raise
            if not final.exists():
                raise
            # Another process was faster: its own is the next to be replaced.
            shutil.rmtree(old, ignore_errors=True)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)
    return final


def _make_durable(directory: Path) -> None:
    _write_checksums(directory)
    for path in [*directory.rglob("*"), directory]:
        _sync(path)


def _after(final: Path) -> Path:
    stem, _, number = final.name.rpartition("+")
    return final.with_name(f"{stem}+{int(number) + 1:02d}")


def delete(directory: Path) -> None:
    """Deletes a checkpoint: it stops being one before the first of its files goes.

    Args:
        directory: The checkpoint; one that is gone already is no error.
    """
    doomed = directory.parent / _owned_name(DELETED)
    try:
        os.rename(directory, doomed)
    except FileNotFoundError:
        return
    if doomed.is_symlink():
        doomed.unlink()
    shutil.rmtree(doomed, ignore_errors=True)


def in_force(parent: Path) -> list[Path]:
    """The directories that may be checkpoints.

    Args:
        parent: Where checkpoints are.

    Returns:
        Those of that name, and one that was moved away for another that has not come.
    """
    found = []
    for path in parent.iterdir():
        left = _left_behind(path)
        if left is None:
            is_one = path.name.startswith(CKPT_PREFIX)
        else:
            is_one = left.kind == REPLACED and not (parent / left.name).exists()
        found += [path] if is_one else []
    return found


def clean_up(parent: Path) -> None:
    """Removes what processes that are dead have left, and restores what they moved away.

    Args:
        parent: Where checkpoints are; one that may not be written to is left as it is.
    """
    with suppress(OSError):
        for path in parent.iterdir():
            left = _left_behind(path)
            if left is None or _may_live(left, path):
                continue
            final = parent / left.name
            if left.kind == REPLACED and not final.exists():
                os.rename(path, final)
            else:
                shutil.rmtree(path, ignore_errors=True)


class _Left(NamedTuple):
    """What a name says that ``_owned_name`` made."""

    kind: str
    machine: str
    pid: str
    start: str
    name: str


def _left_behind(path: Path) -> _Left | None:
    parts = path.name.split(SEPARATOR, 5)
    if len(parts) != 6 or parts[0] not in (WRITING, REPLACED, DELETED):
        return None
    kind, machine, pid, start, _, name = parts
    return _Left(kind, machine, pid, start, name) if pid.isdecimal() else None


def _may_live(left: _Left, path: Path) -> bool:
    if left.machine != _machine():
        # Nobody here can tell: only what nobody has touched for a day is abandoned.
        return time.time() - path.stat().st_mtime < A_DAY
    return _lives(int(left.pid), left.start)


def _lives(pid: int, start: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _start_of(pid) == start


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems of a network cannot do it for a directory.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


# ----------------------------------------------------------------------------- checking


def _write_checksums(directory: Path) -> None:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    entries = {str(path.relative_to(directory)): _checksum(path) for path in files}
    text = yaml.safe_dump(entries)
    text += f"# {zlib.crc32(text.encode()):08x}\n"
    (directory / CHECKSUMS).write_text(text, encoding="utf-8")


def _checksum(path: Path) -> dict[str, Any]:
    """Torch's files are zip archives, with a checksum of each part in them."""
    if zipfile.is_zipfile(path):
        return {"size": path.stat().st_size, "zip": True}
    return {"size": path.stat().st_size, "crc32": zlib.crc32(path.read_bytes())}


def check(directory: Path) -> None:
    """Reads a checkpoint to see whether it is as it was written.

    One that SpeechBrain wrote has no checksums but those within torch's files.

    Args:
        directory: The checkpoint.

    Raises:
        CheckpointError: A file is missing, cut short or changed.
    """
    check_sizes(directory)
    checksums = _checksums(directory)
    for name, entry in checksums.items():
        _check_file(directory / name, entry)
    for path in directory.glob(f"*{PARAMFILE_EXT}"):
        if path.is_file():
            _check_zip(path, known=bool(checksums))


def check_sizes(directory: Path) -> None:
    """A look that costs nothing: whether every file is there, in its length.

    Args:
        directory: The checkpoint.

    Raises:
        CheckpointError: One is not.
    """
    for name, entry in _checksums(directory).items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != entry["size"]:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, and was saved with {entry['size']}"
            )


def check_meta(directory: Path) -> None:
    """Whether the meta file of a checkpoint is as it was written.

    Args:
        directory: The checkpoint.

    Raises:
        CheckpointError: It is not.
    """
    entry = _checksums(directory).get(METAFNAME)
    if entry is not None:
        _check_file(directory / METAFNAME, entry)


def is_checked(directory: Path) -> bool:
    """Whether a checkpoint says what its files should be.

    Args:
        directory: The checkpoint; SpeechBrain's do not.
    """
    return (directory / CHECKSUMS).is_file()


def _check_file(path: Path, entry: dict[str, Any]) -> None:
    if "crc32" in entry and zlib.crc32(path.read_bytes()) != entry["crc32"]:
        raise CheckpointError(f"{path} was changed since it was saved")


def _checksums(directory: Path) -> dict[str, dict[str, Any]]:
    path = directory / CHECKSUMS
    if not path.is_file():
        return {}
    try:
        text, _, own = path.read_text(encoding="utf-8").rpartition("# ")
        intact = f"{zlib.crc32(text.encode()):08x}" == own.strip()
    except UnicodeDecodeError:
        intact = False
    if not intact:
        raise CheckpointError(f"{path} was changed since it was saved")
    return yaml.safe_load(text) or {}


def _check_zip(path: Path, known: bool) -> None:
    """Of one that SpeechBrain wrote, a file that a kill has cut short is told too."""
    with path.open("rb") as content:
        start = content.read(2)
    if not known and not start:
        raise CheckpointError(f"{path} is empty")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
        else:
            broken = "it is cut short" if start == b"PK" else None
    except Exception as error:
        # A bit that is flipped makes zipfile raise almost anything.
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if broken is not None:
        raise CheckpointError(f"{path} was changed since it was saved: {broken}")
