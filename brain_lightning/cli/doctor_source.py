"""What a recipe's source says about its Brains, without running it."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from brain_lightning.errors import RecipeError

# Where a Brain comes from; "sb" is what SpeechBrain's recipes call it.
BRAINS = {
    "speechbrain.Brain": "SpeechBrain's Brain",
    "speechbrain.core.Brain": "SpeechBrain's Brain",
    "brain_lightning.Brain": "brain_lightning's Brain",
    "brain_lightning.brain.Brain": "brain_lightning's Brain",
}


class Place(NamedTuple):
    """A line of a file."""

    file: str
    line: int


@dataclass
class BrainSource:
    """A subclass of Brain as it is written.

    Attributes:
        name: Its name.
        place: Where it begins.
        base: What it is a Brain of.
        methods: Methods of its own and of its bases within the recipe.
        reads: Attributes of ``self`` that they use, and where.
        calls: Methods called on anything, and where: ``backward``, ``step``…
        supers: Methods called on ``super()``, and where.
        unwraps: Where ``.module`` of something else than ``self`` is read.
        entries: Entries of ``self.modules`` that they use.
        hparams_called: What they call in ``self.hparams``, and where.
    """

    name: str
    place: Place
    base: str
    methods: dict[str, Place] = field(default_factory=dict)
    reads: dict[str, list[Place]] = field(default_factory=lambda: defaultdict(list))
    calls: dict[str, list[Place]] = field(default_factory=lambda: defaultdict(list))
    supers: dict[str, list[Place]] = field(default_factory=lambda: defaultdict(list))
    unwraps: list[Place] = field(default_factory=list)
    entries: set[str] = field(default_factory=set)
    hparams_called: dict[str, Place] = field(default_factory=dict)


class RecipeSource:
    """A script, and the files beside it that its Brains come from.

    Args:
        script: The script.

    Attributes:
        brains: Its Brains, in the order of their lines.
        called: Dotted names of the functions that the script calls, and where.

    Raises:
        RecipeError: It cannot be read, or is no Python.
    """

    def __init__(self, script: str | Path) -> None:
        self._path = Path(script)
        self._tree = _parse(self._path)
        self._imported = _imports(self._tree)
        self._classes = {
            node.name: node for node in ast.walk(self._tree) if isinstance(node, ast.ClassDef)
        }
        found = (self._brain(node) for node in self._classes.values())
        self.brains = [brain for brain in found if brain is not None]
        self.called = {
            self._resolve(node.func): Place(self._path.name, node.lineno)
            for node in ast.walk(self._tree)
            if isinstance(node, ast.Call)
        }

    def _brain(self, node: ast.ClassDef) -> BrainSource | None:
        """None for a class that is no Brain; what its bases say comes first."""
        for base in node.bases:
            name = self._resolve(base)
            inherited = self._inherited(name)
            if name in BRAINS or inherited is not None:
                place = Place(self._path.name, node.lineno)
                brain = inherited or BrainSource(node.name, place, BRAINS.get(name, name))
                brain.name, brain.place = node.name, place
                self._read(node, brain)
                return brain
        return None

    def _inherited(self, name: str) -> BrainSource | None:
        if name in self._classes:
            return self._brain(self._classes[name])
        module, _, class_name = name.rpartition(".")
        beside = self._path.parent / (module.replace(".", "/") + ".py")
        if not module or not beside.is_file():
            return None
        found = RecipeSource(beside).brains
        return next((brain for brain in found if brain.name == class_name), None)

    def _read(self, node: ast.ClassDef, brain: BrainSource) -> None:
        for statement in node.body:
            if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
                brain.methods[statement.name] = Place(self._path.name, statement.lineno)
        for part in ast.walk(node):
            if isinstance(part, (ast.Attribute, ast.Subscript)) and _is_self(
                part.value, "modules"
            ):
                brain.entries.add(getattr(part, "attr", ast.unparse(part)))
            if isinstance(part, ast.Attribute):
                self._read_attribute(part, brain)
            if isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute):
                self._read_call(part.func, brain)

    def _read_attribute(self, node: ast.Attribute, brain: BrainSource) -> None:
        place = Place(self._path.name, node.lineno)
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            brain.reads[node.attr].append(place)
        elif node.attr == "module":
            brain.unwraps.append(place)

    def _read_call(self, function: ast.Attribute, brain: BrainSource) -> None:
        owner = function.value
        if _is_self(owner, "hparams"):
            place = Place(self._path.name, function.end_lineno or 0)
            brain.hparams_called.setdefault(function.attr, place)
        on_super = isinstance(owner, ast.Call) and self._resolve(owner.func) == "super"
        calls = brain.supers if on_super else brain.calls
        calls[function.attr].append(Place(self._path.name, function.end_lineno or 0))

    def _resolve(self, node: ast.expr) -> str:
        """The dotted name of an expression, its first part as it was imported."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return ""
        return ".".join([self._imported.get(node.id, node.id), *reversed(parts)])


def _is_self(node: ast.expr, attribute: str) -> bool:
    """Whether an expression is ``self.attribute``."""
    return ast.unparse(node) == f"self.{attribute}"


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from error
    except SyntaxError as error:
        raise RecipeError(f"{path}, line {error.lineno}: {error.msg}") from error


def _imports(tree: ast.Module) -> dict[str, str]:
    return dict(pair for node in ast.walk(tree) for pair in _imported_by(node))


def _imported_by(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield (
                alias.asname or alias.name.split(".")[0],
                (alias.name if alias.asname else alias.name.split(".")[0]),
            )
    if isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            yield alias.asname or alias.name, f"{node.module}.{alias.name}"
