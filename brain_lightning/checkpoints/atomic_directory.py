"""Directories that are there whole or not at all.

A checkpoint is written beside its final name, made durable, and renamed. While it is
written, the process holds a lock on the directory (``flock``), which the kernel releases
when the process ends, however it ends. What nobody holds was left behind, and is cleaned up.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from brain_lightning.errors import CheckpointSaveError

from .integrity import write_checksums
from .state_files import PARAMFILE_EXT

with suppress(ImportError):
    # Windows has none, nor can it open a directory to lock it.
    import fcntl

CKPT_PREFIX = "CKPT"
# Names of directories that are not a checkpoint, or not any more.
WRITING, REPLACED, DELETED = ".writing", ".replaced", ".deleted"
# Version 0.1.0 had a process number and its start in them, and more than the host.
TEMPORARY_NAME = re.compile(
    r"(?P<kind>\.writing|\.replaced|\.deleted)~(?P<host>[^~]+)~(?:\d+~[^~]+~)?"
    r"[0-9a-f]{8}~(?P<final>.*)"
)

# ---------------------------------------------------------------------------- ownership

# The directories that this process writes, by open descriptors that hold their locks.
_locks: dict[Path, int] = {}


def _unlock(directory: Path) -> None:
    descriptor = _locks.pop(directory, None)
    if descriptor is not None:
        os.close(descriptor)


def _unlock_all() -> None:
    for directory in list(_locks):
        _unlock(directory)


if hasattr(os, "register_at_fork"):
    # A lock is held until every copy of its descriptor is closed: a DataLoader worker that is
    # forked during a save, and outlives a killed trainer, must not keep one.
    os.register_at_fork(after_in_child=_unlock_all)


def _is_abandoned(path: Path, descriptor: int, host: str) -> bool:
    """Whether no process writes a directory any more; if so, it is locked from now on."""
    # Many network file systems keep locks within one host. What another host wrote, or
    # where there are no locks, is abandoned when nobody has touched it for a day.
    if host == socket.gethostname():
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:
            pass
    return time.time() - path.stat().st_mtime > 24 * 60 * 60


def clean_up(parent: Path) -> None:
    """Removes what dead processes have left behind, and restores what they moved away.

    Args:
        parent: The folder of checkpoints; one that may not be written to is left as it is.
    """
    with suppress(OSError):
        for path in parent.iterdir():
            name = TEMPORARY_NAME.fullmatch(path.name)
            if name is not None:
                with suppress(OSError):
                    _remove_or_restore(path, name)


def _remove_or_restore(path: Path, name: re.Match[str]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if not _is_abandoned(path, descriptor, name["host"]):
            return
        # Another process may have removed what was opened, and its owner made it again.
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return
        if _is_without_successor(path, name):
            os.rename(path, path.parent / name["final"])
        else:
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)


def _is_without_successor(path: Path, name: re.Match[str]) -> bool:
    """Whether a checkpoint was moved away for another one that is not there."""
    return name["kind"] == REPLACED and not (path.parent / name["final"]).exists()


def may_be_checkpoint(path: Path) -> bool:
    """Whether a directory may be a checkpoint.

    Args:
        path: Anything in a folder of checkpoints.

    Returns:
        True where it has a checkpoint's name, or was moved away for another checkpoint
        that is not there.
    """
    name = TEMPORARY_NAME.fullmatch(path.name)
    if name is None:
        return path.name.startswith(CKPT_PREFIX)
    return _is_without_successor(path, name)


# ------------------------------------------------------------------------------ writing


def _temporary_path(kind: str, parent: Path, final: str = "") -> Path:
    return parent / f"{kind}~{socket.gethostname()}~{uuid.uuid4().hex[:8]}~{final}"


def new_directory(parent: Path) -> Path:
    """Makes the directory that a checkpoint is written to.

    Args:
        parent: Where the checkpoint will be: a rename cannot leave the file system.

    Returns:
        An empty directory, which no reader takes for a checkpoint, locked until it is
        published or removed.
    """
    path = _temporary_path(WRITING, parent)
    with removed_on_failure(path):
        parent.mkdir(parents=True, exist_ok=True)
        # Another process may clean it up before it is locked.
        while not path.exists():
            _unlock(path)
            path.mkdir()
            # It is gone already, or the file system has no locks.
            with suppress(OSError):
                _locks[path] = os.open(path, os.O_RDONLY)
                fcntl.flock(_locks[path], fcntl.LOCK_EX)
    return path


def remove(directory: Path) -> None:
    """Removes a directory that is not to become a checkpoint.

    Args:
        directory: What ``new_directory`` made.
    """
    shutil.rmtree(directory, ignore_errors=True)
    _unlock(directory)


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
        remove(directory)
        if not isinstance(error, OSError) or isinstance(error, CheckpointSaveError):
            raise
        where = str(directory.parent)
        with suppress(OSError):
            where += f" ({shutil.disk_usage(where).free / 2**20:.0f} MiB free)"
        raise CheckpointSaveError(
            f"no checkpoint was saved in {where}: {error}. The earlier ones are as they were"
        ) from error


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
        while not done.wait(timeout=0.02):
            for path in directory.glob(f"*{PARAMFILE_EXT}"):
                # What fails here fails again in `publish`, which raises it.
                with suppress(OSError):
                    _sync(path)

    thread = threading.Thread(target=sync_until_done, name="checkpoint sync")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def rename(directory: Path, final: Path) -> None:
    """Gives a directory its final name, in one step, and unlocks it.

    Args:
        directory: What ``new_directory`` made.
        final: The name that it is to have.
    """
    os.rename(directory, final)
    _unlock(directory)


def publish(directory: Path, final: Path) -> Path:
    """Makes a directory durable and gives it its final name, in one step.

    Args:
        directory: What ``new_directory`` made, with everything in it.
        final: The name that it is to have.

    Returns:
        Where it is: ``final``, or the next number where another process was faster.
    """
    _make_durable(directory)
    while True:
        try:
            rename(directory, final)
            break
        except OSError:
            if not final.exists():
                raise
            stem, _, number = final.name.rpartition("+")
            final = final.with_name(f"{stem}+{int(number) + 1:02d}")
    _sync(final.parent)
    return final


def replace(directory: Path, final: Path) -> Path:
    """As ``publish``, for a name that another checkpoint may have already.

    Args:
        directory: What ``new_directory`` made, with everything in it.
        final: The name; a checkpoint that has it is there until the new one is.

    Returns:
        ``final``.
    """
    _make_durable(directory)
    while True:
        # Not locked: a process that restores it too early makes the next rename fail.
        old = _temporary_path(REPLACED, final.parent, final.name)
        with suppress(FileNotFoundError):
            # Until the next rename the old one is found under this name: see
            # `may_be_checkpoint`.
            os.rename(final, old)
        try:
            rename(directory, final)
            break
        except OSError:
            if not final.exists():
                with suppress(FileNotFoundError):
                    os.rename(old, final)
                raise
            # Another process was faster: its own is the next to be replaced.
            shutil.rmtree(old, ignore_errors=True)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)
    return final


def _make_durable(directory: Path) -> None:
    write_checksums(directory)
    for path in [*directory.rglob("*"), directory]:
        _sync(path)


def delete(directory: Path) -> None:
    """Deletes a checkpoint: it stops being one before the first of its files goes.

    Args:
        directory: The checkpoint; one that is gone already is no error.
    """
    renamed = _temporary_path(DELETED, directory.parent)
    with suppress(FileNotFoundError):
        os.rename(directory, renamed)
    if renamed.is_symlink():
        renamed.unlink()
    shutil.rmtree(renamed, ignore_errors=True)


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
