"""Writes a port as a diff, in place, or to another folder."""

from __future__ import annotations

import difflib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from brain_lightning.errors import RecipeError

from .recipe import Change


def unified_diff(changes: Iterable[Change]) -> str:
    """Returns a diff for ``git apply`` and ``patch -p1`` in the current folder.

    Args:
        changes: Files before and after the port.

    Returns:
        The diff, empty if no file changes.
    """
    return "".join(line for change in changes for line in _diff(change))


def _diff(change: Change) -> Iterator[str]:
    name = _name(change.path)
    before, after = (_lines(text) for text in (change.before, change.after))
    for line in difflib.unified_diff(before, after, f"a/{name}", f"b/{name}"):
        yield line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"


def _name(path: Path) -> str:
    """Returns a path relative to the current folder, as a diff needs it."""
    here, there = Path.cwd(), Path(os.path.abspath(path))
    return (there.relative_to(here) if there.is_relative_to(here) else path).as_posix()


def _lines(text: str) -> list[str]:
    """Splits a text into lines as ``patch`` does: a form feed does not end a line."""
    lines = [f"{line}\n" for line in text.split("\n")]
    last = lines.pop()[:-1]
    return [*lines, last] if last else lines


def changed_lines(change: Change) -> int:
    """Returns the number of lines that a diff removes and adds.

    Args:
        change: A file before and after the port.
    """
    body = list(_diff(change))[2:]
    return sum(line[0] in "+-" for line in body)


def write_in_place(changes: Iterable[Change]) -> list[Path]:
    """Writes all files that change. If one cannot be written, none is changed.

    Args:
        changes: Files before and after the port.

    Returns:
        Paths of the files that were written.

    Raises:
        RecipeError: A file cannot be written.
    """
    written = [change for change in changes if change.before != change.after]
    # Writes to the target of a link, and does not replace the link.
    _replace({change.path.resolve(): (change.path, change.after) for change in written})
    return [change.path for change in written]


def write_beside(changes: Sequence[Change], folder: Path) -> dict[Path, Path]:
    """Writes all files into another folder, with the same paths relative to each other.

    Args:
        changes: Files before and after the port.
        folder: Folder to write. It is created if it does not exist.

    Returns:
        New path of each file.

    Raises:
        RecipeError: A different file of that name exists, or a file cannot be written.
    """
    absolute = {change.path: Path(os.path.abspath(change.path)) for change in changes}
    root = os.path.commonpath([path.parent for path in absolute.values()])
    places = {path: folder / there.relative_to(root) for path, there in absolute.items()}
    for change in changes:
        place = places[change.path]
        if place.is_file() and place.read_bytes() != change.after.encode():
            raise RecipeError(
                f"{place} exists already with other content. Remove it, or set --out to "
                "another folder."
            )
    for place in places.values():
        with _named(place):
            place.parent.mkdir(parents=True, exist_ok=True)
    _replace({places[change.path]: (change.path, change.after) for change in changes})
    return places


def link_rest(places: Mapping[Path, Path]) -> None:
    """Creates links to the other files of the folders, because a script may open them.

    Args:
        places: Original and new path of each file.
    """
    for path, place in places.items():
        for other in Path(os.path.abspath(path)).parent.iterdir():
            if not (place.parent / other.name).exists():
                (place.parent / other.name).symlink_to(other)


def _replace(files: Mapping[Path, tuple[Path, str]]) -> None:
    """Writes temporary files and renames them. If one fails, all files stay as they were.

    Args:
        files: For each path to write, the file whose mode it gets, and the text.
    """
    with ExitStack() as undo:
        written: dict[Path, Path] = {}
        for path, (like, text) in files.items():
            with _named(path):
                written[path] = _temporary(path, text.encode(), like)
                undo.callback(written[path].unlink, missing_ok=True)
        for path, temporary in written.items():
            with _named(path):
                before = path.read_bytes() if path.is_file() else None
                os.replace(temporary, path)
                undo.callback(_restore, path, before)
        undo.pop_all()


def _restore(path: Path, before: bytes | None) -> None:
    if before is None:
        path.unlink()
    else:
        os.replace(_temporary(path, before, path), path)


def _temporary(path: Path, text: bytes, like: Path) -> Path:
    """Writes a temporary file in the folder of a path. If this fails, no file is left."""
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    with ExitStack() as undo:
        undo.callback(os.unlink, name)
        with open(descriptor, "wb") as file:
            file.write(text)
        shutil.copymode(like, name)
        undo.pop_all()
    return Path(name)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns an OSError into a RecipeError that names the file."""
    try:
        yield
    except OSError as error:
        raise RecipeError(f"{path} cannot be written: {error.strerror}") from error
