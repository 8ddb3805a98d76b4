"""Checksums: whether a checkpoint is still as it was written."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import yaml

from brain_lightning.errors import CheckpointError

from .meta_file import METAFNAME
from .state_files import PARAMFILE_EXT

# What each file should be, to notice damage. SpeechBrain neither writes nor reads it.
CHECKSUMS = "checksums.yaml"


def write_checksums(directory: Path) -> None:
    """Writes what each file of a checkpoint is, once all of them are there.

    Args:
        directory: The checkpoint.
    """
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
    """Whether every file is there in its length, which costs nothing to see.

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
    _check_file(directory / METAFNAME, _checksums(directory).get(METAFNAME, {}))


def has_checksums(directory: Path) -> bool:
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
    text, _, own = path.read_bytes().rpartition(b"# ")
    if f"{zlib.crc32(text):08x}".encode() != own.strip():
        raise CheckpointError(f"{path} was changed since it was saved")
    return yaml.safe_load(text) or {}


def _check_zip(path: Path, known: bool) -> None:
    """Without checksums, as SpeechBrain writes it, also finds a file that was cut short."""
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
