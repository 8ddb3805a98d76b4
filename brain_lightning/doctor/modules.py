"""Python files and what their names stand for, read without importing any of them."""

from __future__ import annotations

import ast
import functools
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from brain_lightning.errors import RecipeError

# Where a Brain comes from, by any of its names.
SPEECHBRAINS, OURS = "SpeechBrain's Brain", "brain_lightning's Brain"
BRAINS = {
    "speechbrain.Brain": SPEECHBRAINS,
    "speechbrain.core.Brain": SPEECHBRAINS,
    "brain_lightning.Brain": OURS,
    "brain_lightning.brain.Brain": OURS,
    "brain_lightning.brain.brain.Brain": OURS,
}
# Packages that have no Brain, and are long to read.
WITHOUT_BRAINS = frozenset(sys.stdlib_module_names) | {
    "torch", "torchaudio", "torchvision", "numpy", "scipy", "pandas", "matplotlib", "sklearn",
    "transformers", "datasets", "lightning", "pytorch_lightning", "hyperpyyaml", "tqdm",
}  # fmt: skip
# Before a name that stands for another one of the same file, as in ``Base = sb.Brain``.
ALIAS = "="
# Names that were looked for, each in its file.
Seen = set[tuple[Path, str]]


class Reference(NamedTuple):
    """A dotted name, as of an import.

    Attributes:
        dotted: The name from its top package on.
        root: The folder of the top package, where that is known: of a relative import.
    """

    dotted: str
    root: Path | None = None

    def joined(self, rest: str) -> Reference:
        """The name of something within.

        Args:
            rest: Its name from here on; may be empty.

        Returns:
            Its whole name.
        """
        return Reference(f"{self.dotted}.{rest}" if rest else self.dotted, self.root)


Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, eq=False)
class FunctionSource:
    """A function as it is written, and the file that it is in."""

    node: Function
    module: ModuleSource


@dataclass(frozen=True, eq=False)
class ClassSource:
    """A class as it is written, and the file that it is in."""

    node: ast.ClassDef
    module: ModuleSource


Found = ClassSource | FunctionSource | str


class ModuleSource:
    """A file of Python.

    Args:
        path: The file.

    Attributes:
        path: The file.
        nodes: All of its syntax tree.
        classes: Its classes, by name.
        functions: Its functions that are in no class, by name.
        names: What names that are imported or assigned stand for; there may be several, as in
            ``try: from a import X``, ``except ImportError: from b import X``.
        stars: What ``import *`` is from.

    Raises:
        RecipeError: It cannot be read, or is no Python.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        tree = _parse(path)
        self.nodes = list(ast.walk(tree))
        classes = [node for node in self.nodes if isinstance(node, ast.ClassDef)]
        self.classes = {node.name: ClassSource(node, self) for node in classes}
        self.functions = {node.name: FunctionSource(node, self) for node in tree.body
                          if isinstance(node, Function)}  # fmt: skip
        self.names: dict[str, list[Reference]] = defaultdict(list)
        self.stars: list[Reference] = []
        for node in self.nodes:
            self._read_binding(node)

    def _read_binding(self, node: ast.AST) -> None:
        match node:
            case ast.Import(names):
                for alias in names:
                    first = alias.name.split(".")[0]
                    name = alias.name if alias.asname else first
                    self.names[alias.asname or first].append(Reference(name))
            case ast.ImportFrom(names=names):
                package = self._package(node)
                for alias in names:
                    if alias.name == "*":
                        self.stars.append(package)
                    else:
                        reference = package.joined(alias.name)
                        self.names[alias.asname or alias.name].append(reference)
            case ast.Assign([ast.Name(name)], value) if dotted_name(value) not in ("", name):
                self.names[name].append(Reference(f"{ALIAS}{dotted_name(value)}"))

    def _package(self, node: ast.ImportFrom) -> Reference:
        if not node.level:
            return Reference(node.module or "")
        folder = self.path.resolve().parents[node.level - 1]
        return Reference(folder.name, folder.parent).joined(node.module or "")

    def full_name(self, node: ast.expr) -> str:
        """The dotted name of an expression, its first part as it was imported.

        Args:
            node: Such as ``sb.Brain``.

        Returns:
            Such as ``speechbrain.Brain``; empty where it is no dotted name.
        """
        first, _, rest = dotted_name(node).partition(".")
        known = [r for r in self.names.get(first, []) if not r.dotted.startswith(ALIAS)]
        return (known[-1] if known else Reference(first)).joined(rest).dotted


class Modules:
    """Finds what names stand for, in files beside a script and in installed packages.

    Files are found by walking folders: to import even the parent of a package would run it.

    Args:
        folder: The script's folder, which comes first, as when Python runs the script.
    """

    def __init__(self, folder: Path) -> None:
        self._roots = [folder, *(Path(entry or ".") for entry in sys.path)]

    def resolve(
        self, module: ModuleSource, dotted: str, seen: Seen | None = None
    ) -> Found | None:
        """Finds a class or a function by the name that it has in a file.

        Args:
            module: The file.
            dotted: The name, such as ``sb.Brain``.
            seen: What was looked for already: imports may go in circles.

        Returns:
            The class or function; for a Brain of SpeechBrain or ours what ``BRAINS`` says;
            None where the name is something else, or is not found.
        """
        first, _, rest = dotted.partition(".")
        seen = set() if seen is None else seen
        if (module.path, first) in seen:
            return None
        seen.add((module.path, first))
        if first in module.classes and not rest:
            return module.classes[first]
        if first in module.functions and not rest:
            return module.functions[first]
        for reference in module.names.get(first, []):
            if reference.dotted.startswith(ALIAS):
                name = reference.joined(rest).dotted.removeprefix(ALIAS)
                found = self.resolve(module, name, seen)
            else:
                found = self.follow(reference.joined(rest), module.path, seen)
            if found is not None:
                return found
        stars = (self.follow(star.joined(dotted), module.path, seen) for star in module.stars)
        return next((found for found in stars if found is not None), None)

    def follow(
        self, reference: Reference, importer: Path, seen: Seen | None = None
    ) -> Found | None:
        """Finds a class or a function by its name from the top package on.

        Args:
            reference: The name.
            importer: The file that has it.
            seen: What was looked for already.

        Returns:
            As ``resolve``.
        """
        seen = set() if seen is None else seen
        if reference.dotted in BRAINS:
            return BRAINS[reference.dotted]
        if reference.dotted.split(".")[0] in WITHOUT_BRAINS:
            return None
        roots = [reference.root] if reference.root else [*self._roots, _top_of(importer)]
        for path, rest in _files(reference.dotted.split("."), roots):
            module = _module(path)
            found = self.resolve(module, rest, seen) if module and rest else None
            if found is not None:
                return found
        return None

    def bases(self, cls: ClassSource) -> list[ClassSource | str]:
        """The bases of a class that can be found.

        Args:
            cls: The class.

        Returns:
            Classes; for a Brain of SpeechBrain or ours what ``BRAINS`` says.
        """
        found = [self._base(cls, dotted_name(base)) for base in cls.node.bases]
        return [base for base in found if isinstance(base, (ClassSource, str))]

    def _base(self, cls: ClassSource, name: str) -> Found | None:
        if name == cls.node.name:
            # class Brain(Brain): of the one that is imported.
            imported = cls.module.names.get(name, [])
            found = (self.follow(reference, cls.module.path) for reference in imported)
            return next((base for base in found if base is not None), None)
        return self.resolve(cls.module, name)

    def ancestors(self, cls: ClassSource) -> list[ClassSource | str]:
        """A class and all that it inherits from, in the order in which methods are found.

        Args:
            cls: The class.

        Returns:
            Python's order, but for hierarchies that Python refuses.
        """
        order: list[ClassSource | str] = []

        def visit(one: ClassSource | str, below: Sequence[ClassSource | str]) -> None:
            if one in below:
                return
            order.append(one)
            if isinstance(one, ClassSource):
                for base in self.bases(one):
                    visit(base, [*below, one])

        visit(cls, [])
        # A base that several share comes after all of them.
        return list(dict.fromkeys(reversed(order)))[::-1]


def dotted_name(node: ast.expr) -> str:
    """An expression such as ``a.b.c``.

    Args:
        node: The expression.

    Returns:
        Its text; empty where it is something else.
    """
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _files(parts: Sequence[str], roots: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """The files that may have a name, the longest path first, and its name in them."""
    root = next((r for r in roots if (r / parts[0]).is_dir() or _python(r, parts[0])), None)
    found: list[tuple[Path, str]] = []
    for index, part in enumerate(parts):
        if root is None:
            break
        rest = ".".join(parts[index + 1 :])
        if path := _python(root, part):
            found.append((path, rest))
        root = root / part if (root / part).is_dir() else None
    yield from reversed(found)


def _python(folder: Path, name: str) -> Path | None:
    choices = (folder / name / "__init__.py", folder / f"{name}.py")
    return next((path for path in choices if path.is_file()), None)


def _top_of(path: Path) -> Path:
    """The folder that a file's top package is in."""
    folder = path.resolve().parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return folder


def _module(path: Path) -> ModuleSource | None:
    """None for what is no Python of this version: it may never be reached."""
    try:
        return _read(path.resolve(), path.stat().st_mtime_ns)
    except RecipeError:
        return None


@functools.lru_cache(maxsize=256)
def _read(path: Path, _changed: int) -> ModuleSource:
    return ModuleSource(path)


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from error
    except SyntaxError as error:
        raise RecipeError(f"{path}, line {error.lineno}: {error.msg}") from error
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error
