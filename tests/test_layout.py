"""CONTRIBUTING.md shows the house as it is; files and functions stay small."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

import pytest

import brain_lightning
from tests.conftest import LONG

PACKAGE = Path(brain_lightning.__file__).parent
CONTRIBUTING = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
FILES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))


def block(name: str) -> list[str]:
    return CONTRIBUTING.split(f"```{name}\n")[1].split("\n```")[0].splitlines()


def first_line(folder: Path) -> str:
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert docstring is not None, f"{folder} does not say what it is for"
    return docstring.splitlines()[0]


def test_the_tree_has_each_folder_and_what_it_is_for() -> None:
    name, *lines = block("tree")
    assert name == "brain_lightning/"
    shown = dict(line.split(maxsplit=1) for line in lines)
    assert shown == {f"{folder.name}/": first_line(folder) for folder in FOLDERS}


def test_the_tree_is_in_the_order_of_the_layers() -> None:
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    layers = [
        line.strip(' ",')
        for line in text.split("layers = [\n")[1].split("\n]")[0].splitlines()
    ]
    shown = [line.split()[0].removesuffix("/") for line in block("tree")[1:]]
    assert shown == [layer for layer in reversed(layers) if (PACKAGE / layer).is_dir()]


def test_the_files_that_begin_first_are_there() -> None:
    tests = Path(__file__).parent
    assert [name for name in LONG if not (tests / name).is_file()] == []


@pytest.mark.parametrize("line", block("batch"))
def test_the_way_of_a_batch_goes_through_functions_that_are_there(line: str) -> None:
    file, function, _ = line.split(maxsplit=2)
    nodes = ast.walk(ast.parse((PACKAGE / file).read_text()))
    assert function in {n.name for n in nodes if isinstance(n, ast.FunctionDef)}


def bodies(path: Path) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            has_docstring = ast.get_docstring(node) is not None
            body = node.body[1:] if has_docstring else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            found.append((f"{path.name}:{node.name}", lines))
    return found


def test_functions_files_and_folders_are_small() -> None:
    assert all(len(path.read_text().splitlines()) < 450 for path in FILES)
    sizes = [size for path in FILES for size in bodies(path)]
    assert statistics.median(lines for _, lines in sizes) <= 7
    assert max(lines for _, lines in sizes) <= 60, max(sizes, key=lambda s: s[1])
    for folder in FOLDERS:
        assert len([path for path in folder.glob("*.py") if path.stem != "__init__"]) <= 12
