"""Checksums: whether a checkpoint is still as it was written."""

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

# What each file should be, to notice damage. SpeechBrain neither writes nor reads it.
CHECKSUMS = "checksums.yaml"
# A file is read in pieces, of which one is in memory at a time.
PIECE = 32 * 2**20


def write_checksums(directory: Path) -> None:
    """Writes what each file of a checkpoint is, once all of them are there.

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
    """Writes what each file of a folder in a checkpoint is, all processes together.

    Each reads what it has written itself: no other sees it as soon on every file system.

    Args:
        part: The folder.
        own: The files of this process.
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
    """Whether torch wrote a file as a zip archive, with a checksum of each part in it.

    Args:
        path: A file of a checkpoint. One of shards is several archives, one after the other.
    """
    return path.suffix == PARAMFILE_EXT and zipfile.is_zipfile(path)


def _crc32(path: Path) -> int:
    result = 0
    for piece in pieces(path):
        result = zlib.crc32(piece, result)
    return result


def pieces(path: Path) -> Iterator[bytes]:
    """The content of a file; of an empty one there is one piece, to be sent as any.

    Args:
        path: The file.

    Yields:
        Its pieces.
    """
    with path.open("rb") as content:
        piece: bytes | None = content.read(PIECE)
        while piece is not None:
            yield piece
            piece = content.read(PIECE) or None


def check(directory: Path) -> None:
    """Reads a checkpoint to see whether it is as it was written.

    One that SpeechBrain wrote has no checksums but those within torch's files.

    Args:
        directory: The checkpoint.

    Raises:
        CheckpointError: A file is missing, cut short or changed.
    """
    check_sizes(directory)
    known = checksums(directory)
    for name, entry in known.items():
        _check_file(directory / name, entry)
    for path in directory.glob(f"*{PARAMFILE_EXT}"):
        if path.is_file():
            _check_zip(path, known=bool(known))


def check_sizes(directory: Path) -> None:
    """Whether every file is there in its length, which costs nothing to see.

    Args:
        directory: The checkpoint.

    Raises:
        CheckpointError: One is not.
    """
    for name, entry in checksums(directory).items():
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
    _check_file(directory / METAFNAME, checksums(directory).get(METAFNAME, {}))


def has_checksums(directory: Path) -> bool:
    """Whether a checkpoint says what its files should be.

    Args:
        directory: The checkpoint; SpeechBrain's do not.
    """
    return (directory / CHECKSUMS).is_file()


def _check_file(path: Path, entry: dict[str, Any]) -> None:
    if "crc32" in entry and _crc32(path) != entry["crc32"]:
        raise CheckpointError(f"{path} was changed since it was saved")


def checksums(directory: Path) -> dict[str, dict[str, Any]]:
    """What each file of a checkpoint should be, by its name; nothing where that is not known.

    Args:
        directory: The checkpoint.

    Raises:
        CheckpointError: It was changed.
    """
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
