"""What a port gives: a diff, files in place, or files beside."""

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
    """The changes, as ``git apply`` and ``patch -p1`` take them in this folder.

    Args:
        changes: Files as they were and as they become.

    Returns:
        A diff, empty where nothing changes.
    """
    return "".join(line for change in changes for line in _diff(change))


def _diff(change: Change) -> Iterator[str]:
    name = _name(change.path)
    before, after = (_lines(text) for text in (change.before, change.after))
    for line in difflib.unified_diff(before, after, f"a/{name}", f"b/{name}"):
        yield line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"


def _name(path: Path) -> str:
    """Its path from here, which a diff needs."""
    here, there = Path.cwd(), Path(os.path.abspath(path))
    return (there.relative_to(here) if there.is_relative_to(here) else path).as_posix()


def _lines(text: str) -> list[str]:
    """Lines as ``patch`` counts them: a form feed does not end one."""
    lines = [f"{line}\n" for line in text.split("\n")]
    last = lines.pop()[:-1]
    return [*lines, last] if last else lines


def changed_lines(change: Change) -> int:
    """How many lines a diff takes out or puts in.

    Args:
        change: A file.
    """
    body = list(_diff(change))[2:]
    return sum(line[0] in "+-" for line in body)


def write_in_place(changes: Iterable[Change]) -> list[Path]:
    """Writes all files that change, or none.

    Args:
        changes: Files as they were and as they become.

    Returns:
        What was written.

    Raises:
        RecipeError: One cannot be written.
    """
    written = [change for change in changes if change.before != change.after]
    # What a link stands for, and not the link.
    _replace({change.path.resolve(): (change.path, change.after) for change in written})
    return [change.path for change in written]


def write_beside(changes: Sequence[Change], folder: Path) -> dict[Path, Path]:
    """Writes all files into a folder, where they lie to each other as they did.

    Args:
        changes: Files as they were and as they become.
        folder: Where to; it is made.

    Returns:
        Where each file is now.

    Raises:
        RecipeError: A file is there already, and is another one; one cannot be written.
    """
    absolute = {change.path: Path(os.path.abspath(change.path)) for change in changes}
    root = os.path.commonpath([path.parent for path in absolute.values()])
    places = {path: folder / there.relative_to(root) for path, there in absolute.items()}
    for change in changes:
        place = places[change.path]
        if place.is_file() and place.read_bytes() != change.after.encode():
            raise RecipeError(
                f"{place} is there already, and is another file: remove it, or choose "
                "another folder for --out"
            )
    for place in places.values():
        with _named(place):
            place.parent.mkdir(parents=True, exist_ok=True)
    _replace({places[change.path]: (change.path, change.after) for change in changes})
    return places


def link_rest(places: Mapping[Path, Path]) -> None:
    """Links what else lies beside files, as a script may look for it.

    Args:
        places: Files, and where they were written to.
    """
    for path, place in places.items():
        for other in Path(os.path.abspath(path)).parent.iterdir():
            if not (place.parent / other.name).exists():
                (place.parent / other.name).symlink_to(other)


def _replace(files: Mapping[Path, tuple[Path, str]]) -> None:
    """Writes files beside their places and renames them; all of them, or none.

    Args:
        files: Where to, the file whose mode it gets, and the text.
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
    """A file beside a place, with the mode of another one; nothing is left where it fails."""
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
    """Says which file it was that could not be written."""
    try:
        yield
    except OSError as error:
        raise RecipeError(f"{path} cannot be written: {error.strerror}") from error
