"""Finds the modules in a script's folder that the script imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from brain_lightning.errors import RecipeError

from .equivalents import OURS

# Some editors write it at the start of UTF-8 files. It is preserved.
BYTE_ORDER_MARK = "\ufeff"
# A folder of this name beside a script is a checkout of the package, not part of the recipe.
NOT_LOCAL = frozenset({"speechbrain", OURS})
# Names in a file that reads the command line, with parse_arguments or by itself.
READ_COMMAND_LINE = frozenset({
    "parse_arguments", "argv", "argparse", "click", "docopt", "fire", "hydra", "jsonargparse",
    "typer", "tyro",
})  # fmt: skip
IGNORES_COMMAND_LINE = (
    "The script does not call parse_arguments. It ignores run options, overrides and "
    "--trainer.X=Y on its command line. brain-lightning run applies only --trainer.X=Y to "
    "it. To apply all of them, call parse_arguments, and pass its run options to the Brain."
)


def read_script(path: Path) -> str:
    """Reads a script without changing its line endings.

    Args:
        path: Path of the script.

    Returns:
        Text of the script.

    Raises:
        RecipeError: The file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def parse(text: str, path: Path) -> ast.Module:
    """Parses a script.

    Args:
        text: Text of the script.
        path: Path of the script, for error messages.

    Returns:
        The syntax tree.

    Raises:
        RecipeError: The text is not valid Python.
    """
    try:
        return ast.parse(text.removeprefix(BYTE_ORDER_MARK), str(path))
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise RecipeError(f"{path}{line}: {error}") from error


def local_modules(script: Path) -> list[Path]:
    """Returns the modules in a script's folder that it imports, directly or indirectly.

    Args:
        script: Path of the script, whose folder Python puts on ``sys.path``.

    Returns:
        Paths of the modules, without the script.

    Raises:
        RecipeError: A module cannot be read.
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


def ignores_command_line(script: Path) -> bool:
    """Returns whether neither a script nor its local modules read the command line.

    Args:
        script: Path of the script.

    Returns:
        False also if a file cannot be read or parsed, because it may read the command line.
    """
    try:
        trees = [parse(read_script(path), path) for path in (script, *local_modules(script))]
    except RecipeError:
        return False
    return not any(READ_COMMAND_LINE & set(_names(tree)) for tree in trees)


def _names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(name) | ast.Attribute(attr=name):
                yield name
            case ast.alias(name):
                yield from name.split(".")
            case ast.ImportFrom(module=str(name)):
                yield from name.split(".")


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
    """Yields the files of a dotted name: its packages and its module.

    Args:
        folder: Folder that contains the first part.
        parts: Parts of the name.

    Yields:
        Paths of the files that exist.
    """
    if parts[0] in NOT_LOCAL:
        return
    for part in parts:
        for path in (folder / f"{part}.py", folder / part / "__init__.py"):
            if path.is_file():
                yield path
        folder = folder / part
