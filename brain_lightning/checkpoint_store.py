"""Directories that are there whole or not at all, and a look at whether they still are.

A checkpoint is written beside its final place, made durable, and renamed. What a
process that died has left behind is found by its name and cleaned up.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from .errors import CheckpointError, CheckpointSaveError

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
KNOWN_ERRORS = (CheckpointError, CheckpointSaveError)


# ------------------------------------------------------------------------------ writing


def _owned_name(kind: str, name: str) -> str:
    """A name that says which process it belongs to; its start tells it from a later one."""
    owner = (
        f"{socket.gethostname()}{SEPARATOR}{os.getpid()}{SEPARATOR}{_start_of(os.getpid())}"
    )
    return SEPARATOR.join([kind, owner, uuid.uuid4().hex[:8], name])


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
    path = parent / _owned_name(WRITING, "")
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
        # torch raises a RuntimeError where it cannot write.
        if isinstance(error, OSError | RuntimeError) and not isinstance(error, KNOWN_ERRORS):
            where, free = directory.parent, shutil.disk_usage(directory.parent).free / 2**20
            raise CheckpointSaveError(
                f"no checkpoint was saved in {where} ({free:.0f} MiB free): {error}. The "
                "earlier ones are as they were"
            ) from error
        raise


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
    _write_checksums(directory)
    for path in directory.iterdir():
        _sync(path)
    _sync(directory)
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
    old = final.parent / _owned_name(REPLACED, final.name)
    if final.exists():
        # From here to the next rename the old one is found under this name by `clean_up`.
        os.rename(final, old)
    publish(directory, final)
    shutil.rmtree(old, ignore_errors=True)
    return final


def _after(final: Path) -> Path:
    stem, _, number = final.name.rpartition("+")
    return final.with_name(f"{stem}+{int(number) + 1:02d}")


def delete(directory: Path) -> None:
    """Deletes a checkpoint: it stops being one before the first of its files goes.

    Args:
        directory: The checkpoint; one that is gone already is no error.
    """
    doomed = directory.parent / _owned_name(DELETED, directory.name)
    try:
        os.rename(directory, doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def clean_up(parent: Path) -> None:
    """Removes what processes that are dead have left, and restores what they moved away.

    Args:
        parent: Where checkpoints are.
    """
    for path in parent.iterdir():
        kind, *owner = path.name.split(SEPARATOR)
        if kind not in (WRITING, REPLACED, DELETED) or _lives(*owner[:3]):
            continue
        final = parent / owner[-1]
        if kind == REPLACED and not final.exists():
            os.rename(path, final)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _lives(host: str, pid: str, start: str) -> bool:
    if host != socket.gethostname():
        # Nobody here can tell.
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _start_of(int(pid)) == start


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ----------------------------------------------------------------------------- checking


def _write_checksums(directory: Path) -> None:
    entries = {path.name: _checksum(path) for path in sorted(directory.iterdir())}
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
    for name, entry in _checksums(directory).items():
        path = directory / name
        if "crc32" in entry and zlib.crc32(path.read_bytes()) != entry["crc32"]:
            raise CheckpointError(f"{path} was changed since it was saved")
    for path in directory.glob(f"*{PARAMFILE_EXT}"):
        _check_zip(path)


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


def _check_zip(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if broken is not None:
        raise CheckpointError(f"{path} was changed since it was saved: {broken}")
