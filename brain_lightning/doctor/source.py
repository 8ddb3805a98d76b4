"""A recipe's Brains as they are written in its source, which is not run."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable
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


class Location(NamedTuple):
    """A line of a file."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


Locations = dict[str, list[Location]]


@dataclass
class BrainSource:
    """A subclass of Brain as it is written.

    Attributes:
        name: Its name.
        location: Where it begins.
        base: What it is a Brain of.
        methods: Its methods, and those of its bases within the recipe.
        reads: Attributes of ``self`` that they use, and where.
        calls: Methods called on anything, and where: ``backward``, ``step``…
        supers: Methods called on ``super()``, and where.
        unwraps: Where ``.module`` of something else than ``self`` is read.
        entries: Entries of ``self.modules`` that they use.
        hparams_called: What they call in ``self.hparams``, and where.
    """

    name: str
    location: Location
    base: str
    methods: dict[str, Location] = field(default_factory=dict)
    reads: Locations = field(default_factory=lambda: defaultdict(list))
    calls: Locations = field(default_factory=lambda: defaultdict(list))
    supers: Locations = field(default_factory=lambda: defaultdict(list))
    unwraps: list[Location] = field(default_factory=list)
    entries: set[str] = field(default_factory=set)
    hparams_called: dict[str, Location] = field(default_factory=dict)


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
        nodes = list(ast.walk(_parse(self._path)))
        self._imported = _imports(nodes)
        self._classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
        found = (self._brain(node) for node in self._classes.values())
        self.brains = [brain for brain in found if brain is not None]
        self.called = {
            self._resolve(node.func): self._location(node.lineno)
            for node in nodes
            if isinstance(node, ast.Call)
        }

    def _location(self, line: int | None) -> Location:
        return Location(self._path.name, line or 0)

    def _brain(self, node: ast.ClassDef) -> BrainSource | None:
        """None for a class that is no Brain; its bases are read first."""
        for base in node.bases:
            name = self._resolve(base)
            inherited = self._inherited(name)
            if name in BRAINS or inherited is not None:
                location = self._location(node.lineno)
                brain = inherited or BrainSource(node.name, location, BRAINS.get(name, name))
                brain.name, brain.location = node.name, location
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
                brain.methods[statement.name] = self._location(statement.lineno)
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
        location = self._location(node.lineno)
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            brain.reads[node.attr].append(location)
        elif node.attr == "module":
            brain.unwraps.append(location)

    def _read_call(self, function: ast.Attribute, brain: BrainSource) -> None:
        owner, location = function.value, self._location(function.end_lineno)
        if _is_self(owner, "hparams"):
            brain.hparams_called.setdefault(function.attr, location)
        on_super = isinstance(owner, ast.Call) and self._resolve(owner.func) == "super"
        calls = brain.supers if on_super else brain.calls
        calls[function.attr].append(location)

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


def _imports(nodes: Iterable[ast.AST]) -> dict[str, str]:
    """What each imported name stands for; ``import a.b`` gives ``a``."""
    imported: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                imported[alias.asname or first] = alias.name if alias.asname else first
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return imported
