"""Ports every recipe of a folder, checks each port, and prints what became of them.

    python -m tests.system.port_recipes CHECKOUT/recipes [recipes.tsv]

Each train*.py with the YAML files of its folder, or each row of recipes.tsv, is ported. ``git
apply`` and ``patch`` have to make the same files of the diff. These have to parse, to be left
alone by a second port, to differ in nothing but what a port is for, and to have no name in
them that ruff finds undefined or unused where it did not before. The exit status is 1 where
one of that fails.
"""

from __future__ import annotations

import ast
import collections
import difflib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from brain_lightning.port.files import changed_lines, unified_diff, write_beside
from brain_lightning.port.recipe import Change, PortedRecipe, port_recipe

# What stands before a name of ours, and lines that a port may change as a whole.
PREFIX = re.compile(
    r"\b(sb|speechbrain|brain_lightning)\.(core\.)?(?=(Brain|Stage|parse_arguments)\b)"
)
WHOLE_LINE = re.compile(r"\s*(from [\w.]+ import .*|import .*|#.*|.*ddp_init_group\(.*\))?\n?")
TAG = re.compile(
    r"speechbrain\.utils\.(epoch_loop|checkpoints)\.(?=(EpochCounter|Checkpointer)\w*\b)"
)
LINT = ["ruff", "check", "--isolated", "--select=F401,F811,F821", "--output-format=json"]


class Row(NamedTuple):
    """A recipe and what became of it."""

    script: Path
    recipe: PortedRecipe
    python: int
    yaml: list[int]


def recipes_of(root: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Each training script below a folder, with the YAML files that lie beside it."""
    for script in sorted(root.rglob("train*.py")):
        yield script, sorted(p for p in script.parent.rglob("*.yaml") if "hparams" in p.parts)


def rows_of(checkout: Path, table: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Each script of recipes.tsv, with its YAML file."""
    for line in table.read_text().splitlines()[1:]:
        _, script, hparams, *_ = line.split("\t")
        beside = (checkout / script).parent / "hyperparams.yaml"
        yield checkout / script, [beside if hparams == "-" else checkout / hparams]


def check(script: Path, hparams: Sequence[Path]) -> Row:
    """Ports a recipe and checks the port."""
    recipe = port_recipe(script, hparams)
    changed = [change for change in recipe.changes if change.before != change.after]
    for tool in (["git", "apply", "-"], ["patch", "-s", "-p1"]):
        with tempfile.TemporaryDirectory() as folder:
            _check_diff(recipe, Path(folder), tool)
    _check_second(recipe)
    for change in changed:
        _check_lines(change)
        if change.path.suffix == ".py":
            assert not _lint(change.after) - _lint(change.before), change.path
    counts = {change.path: changed_lines(change) for change in changed}
    python = sum(count for path, count in counts.items() if path.suffix == ".py")
    return Row(script, recipe, python, [counts.get(path, 0) for path in recipe.hparams])


def _check_diff(recipe: PortedRecipe, folder: Path, tool: Sequence[str]) -> None:
    """The diff of a recipe's own folder, applied to a copy of it, gives the port."""
    root = os.path.commonpath([change.path.parent for change in recipe.changes])
    for change in recipe.changes:
        place = folder / change.path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(change.path, place)
    here = os.getcwd()
    os.chdir(root)
    try:
        diff = unified_diff(recipe.changes)
    finally:
        os.chdir(here)
    if diff:
        subprocess.run(tool, input=diff.encode(), cwd=folder, check=True)
    for change in recipe.changes:
        text = (folder / change.path.relative_to(root)).read_bytes().decode()
        assert text == change.after, f"{tool[0]}: {change.path}"
        if change.path.suffix == ".py":
            ast.parse(text)


def _check_lines(change: Change) -> None:
    """Without what stands before the names of ours a file is the same, but for some lines."""
    if change.path.suffix != ".py":
        expected = TAG.sub("brain_lightning.", change.before)
        assert change.after == expected, change.path
        return
    before, after = (
        PREFIX.sub("", text).splitlines(keepends=True)
        for text in (change.before, change.after)
    )
    for line in difflib.ndiff(before, after):
        if line[0] in "+-":
            assert WHOLE_LINE.fullmatch(line[2:]), f"{change.path}: {line}"


def _lint(text: str) -> collections.Counter[str]:
    """What ruff finds in a script."""
    done = subprocess.run(
        [*LINT, "-"], input=text, capture_output=True, text=True, check=False
    )
    return collections.Counter(found["message"] for found in json.loads(done.stdout))


def _check_second(recipe: PortedRecipe) -> None:
    """A port is ported already: whole, where the first was, and without a change."""
    with tempfile.TemporaryDirectory() as folder:
        places = write_beside(recipe.changes, Path(folder))
        second = port_recipe(places[recipe.script], [places[path] for path in recipe.hparams])
        assert all(change.before == change.after for change in second.changes), recipe.script
        assert second.outcome == recipe.outcome, recipe.script


def show(rows: Sequence[Row]) -> None:
    """Prints each recipe that is not ported whole, and the counts."""
    for row in rows:
        for remark in row.recipe.remarks:
            print(f"{row.recipe.outcome}: {remark}")
    counts = collections.Counter(row.recipe.outcome for row in rows)
    ported = [row for row in rows if row.recipe.brains]
    print(f"{len(rows)} scripts: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    lines = [row.python for row in ported]
    print(f"lines changed in Python: median {statistics.median(lines)}, most {max(lines)}")
    yaml = [count for row in ported for count in row.yaml]
    print(f"lines changed in YAML: median {statistics.median(yaml)}, most {max(yaml)}")


def main() -> int:
    """Ports all, and prints."""
    root = Path(sys.argv[1]).resolve()
    found = list(rows_of(root.parent, Path(sys.argv[2])) if sys.argv[2:] else recipes_of(root))
    rows = [row for script, hparams in found if (row := checked(script, hparams))]
    show(rows)
    return 0 if len(rows) == len(found) else 1


def checked(script: Path, hparams: Sequence[Path]) -> Row | None:
    """Checks a recipe, whatever becomes of the others."""
    try:
        return check(script, hparams)
    except Exception as error:  # noqa: BLE001
        print(f"FAILED: {script}: {type(error).__name__}: {error}")
        return None


if __name__ == "__main__":
    sys.exit(main())
