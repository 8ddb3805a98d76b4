"""The modules of a recipe's own that a script imports: files beside it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from brain_lightning.errors import RecipeError

from .equivalents import OURS

# What some editors begin a file in UTF-8 with; it stays.
BYTE_ORDER_MARK = "\ufeff"
# A folder of this name beside a script is a checkout of it, not a part of the recipe.
NOT_LOCAL = frozenset({"speechbrain", OURS})


def read_script(path: Path) -> str:
    """Reads a script, its line ends as they are.

    Args:
        path: The script.

    Returns:
        Its text.

    Raises:
        RecipeError: It cannot be read, or is no text in UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def parse(text: str, path: Path) -> ast.Module:
    """Parses a script.

    Args:
        text: Its text.
        path: Where it is, for an error.

    Returns:
        Its tree.

    Raises:
        RecipeError: It is no Python.
    """
    try:
        return ast.parse(text.removeprefix(BYTE_ORDER_MARK), str(path))
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise RecipeError(f"{path}{line}: {error}") from error


def local_modules(script: Path) -> list[Path]:
    """The modules that a script imports and that lie beside it, and those that they import.

    Args:
        script: The script; Python puts its folder on the path.

    Returns:
        The files, without the script.

    Raises:
        RecipeError: One cannot be read.
    """
    found: dict[Path, None] = {script: None}
    waiting = [script]
    while waiting:
        path = waiting.pop()
        tree = parse(read_script(path), path)
        for each in _imported(tree, path.parent, script.parent):
            if each not in found:
                found[each] = None
                waiting.append(each)
    return list(found)[1:]


def _imported(tree: ast.Module, here: Path, root: Path) -> Iterator[Path]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from files_of(root, alias.name.split("."))
        if isinstance(node, ast.ImportFrom):
            start = root if not node.level else [here, *here.parents][node.level - 1]
            parts = node.module.split(".") if node.module else []
            for alias in node.names:
                yield from files_of(start, [*parts, alias.name])


def files_of(folder: Path, parts: list[str]) -> Iterator[Path]:
    """The modules on the way of a dotted name, packages among them.

    Args:
        folder: Where its first part is looked for.
        parts: The parts of the name.

    Yields:
        Those that are files.
    """
    if parts[0] in NOT_LOCAL:
        return
    for part in parts:
        for path in (folder / f"{part}.py", folder / part / "__init__.py"):
            if path.is_file():
                yield path
        folder = folder / part
