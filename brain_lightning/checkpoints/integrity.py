"""Checksums, to detect that a checkpoint was changed after it was written."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from brain_lightning.distributed.communication import collectively, gather, if_main_process
from brain_lightning.errors import CheckpointError

from .meta_file import METAFNAME
from .state_files import PARAMFILE_EXT

# File with the size and the checksum of each file. SpeechBrain neither writes nor reads it.
CHECKSUMS = "checksums.yaml"
# Size of the pieces in which a file is read. One piece is in memory at a time.
PIECE = 32 * 2**20


def write_checksums(directory: Path) -> None:
    """Writes the checksums of a checkpoint. Called when all its files are written.

    Args:
        directory: The checkpoint.
    """
    known: dict[str, dict[str, Any]] = {}
    for part in sorted(directory.glob(f"*{PARAMFILE_EXT}/{CHECKSUMS}")):
        name = part.parent.name
        known |= {f"{name}/{file}": each for file, each in checksums(part.parent).items()}
        part.unlink()
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    names = {str(path.relative_to(directory)): path for path in files}
    _write(
        directory,
        known | {n: _checksum(path) for n, path in names.items() if n not in known},
    )


def write_checksums_together(part: Path, own: Iterable[Path]) -> None:
    """Writes the checksums of a folder in a checkpoint. The call is collective.

    Each rank reads the files that it has written, because on some file systems other ranks
    see them only later.

    Args:
        part: The folder.
        own: Files that this rank has written.
    """
    found = gather(collectively(lambda: {path.name: _checksum(path) for path in own}))
    if if_main_process():
        _write(part, {name: each for files in found for name, each in files.items()})


def _write(directory: Path, entries: Mapping[str, Any]) -> None:
    text = yaml.safe_dump(dict(entries))
    text += f"# {zlib.crc32(text.encode()):08x}\n"
    (directory / CHECKSUMS).write_text(text, encoding="utf-8")


def _checksum(path: Path) -> dict[str, Any]:
    if is_archive(path):
        return {"size": path.stat().st_size, "zip": True}
    return {"size": path.stat().st_size, "crc32": _crc32(path)}


def is_archive(path: Path) -> bool:
    """Whether a file is a zip archive of torch, which has a checksum for each of its parts.

    Args:
        path: File of a checkpoint. A file of shards is not such an archive: it contains
            several archives, one after the other.
    """
    return path.suffix == PARAMFILE_EXT and zipfile.is_zipfile(path)


def _crc32(path: Path) -> int:
    result = 0
    for piece in pieces(path):
        result = zlib.crc32(piece, result)
    return result


def pieces(path: Path) -> Iterator[bytes]:
    """Reads a file in pieces. An empty file has one empty piece, so that it can be sent.

    Args:
        path: The file.

    Yields:
        The pieces.
    """
    with path.open("rb") as content:
        piece: bytes | None = content.read(PIECE)
        while piece is not None:
            yield piece
            piece = content.read(PIECE) or None


def check(directory: Path) -> None:
    """Reads a checkpoint completely, and verifies that it is unchanged.

    A checkpoint of SpeechBrain has no checksums except those within torch's files.

    Args:
        directory: The checkpoint.

    Raises:
        CheckpointError: A file is missing, truncated or changed.
    """
    check_sizes(directory)
    known = checksums(directory)
    for name, entry in known.items():
        _check_file(directory / name, entry)
    for path in directory.glob(f"*{PARAMFILE_EXT}"):
        if path.is_file():
            _check_zip(path, known=bool(known))


def check_sizes(directory: Path) -> None:
    """Verifies that each file exists and has its size, without reading the files.

    Args:
        directory: The checkpoint.

    Raises:
        CheckpointError: A file is missing or has another size.
    """
    for name, entry in checksums(directory).items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != entry["size"]:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, but was saved with {entry['size']}"
            )


def check_meta(directory: Path) -> None:
    """Verifies that the meta file of a checkpoint is unchanged.

    Args:
        directory: The checkpoint.

    Raises:
        CheckpointError: The meta file was changed.
    """
    _check_file(directory / METAFNAME, checksums(directory).get(METAFNAME, {}))


def has_checksums(directory: Path) -> bool:
    """Whether a checkpoint has a file with checksums. SpeechBrain's checkpoints have none.

    Args:
        directory: The checkpoint.
    """
    return (directory / CHECKSUMS).is_file()


def _check_file(path: Path, entry: dict[str, Any]) -> None:
    if "crc32" in entry and _crc32(path) != entry["crc32"]:
        raise CheckpointError(f"{path} was changed since it was saved")


def checksums(directory: Path) -> dict[str, dict[str, Any]]:
    """Returns the size and checksum of each file by name; empty if there are no checksums.

    Args:
        directory: The checkpoint.

    Raises:
        CheckpointError: The file with the checksums was changed.
    """
    path = directory / CHECKSUMS
    if not path.is_file():
        return {}
    text, _, own = path.read_bytes().rpartition(b"# ")
    if f"{zlib.crc32(text):08x}".encode() != own.strip():
        raise CheckpointError(f"{path} was changed since it was saved")
    return yaml.safe_load(text) or {}


def _check_zip(path: Path, known: bool) -> None:
    """Verifies a torch file. Without ``known`` checksums, also detects a truncated file."""
    with path.open("rb") as content:
        start = content.read(2)
    if not known and not start:
        raise CheckpointError(f"{path} is empty")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
        else:
            broken = "it is truncated" if start == b"PK" else None
    except Exception as error:
        # If a bit is flipped, zipfile may raise almost any exception.
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if broken is not None:
        raise CheckpointError(f"{path} was changed since it was saved: {broken}")
