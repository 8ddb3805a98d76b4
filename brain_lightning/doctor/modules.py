"""Reads Python files and resolves the names in them, without importing them."""

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

# The two Brain classes, and the names under which they can be imported.
SPEECHBRAIN, OURS = "SpeechBrain's Brain", "brain_lightning's Brain"
BRAINS = {
    "speechbrain.Brain": SPEECHBRAIN,
    "speechbrain.core.Brain": SPEECHBRAIN,
    "brain_lightning.Brain": OURS,
    "brain_lightning.brain.Brain": OURS,
    "brain_lightning.brain.brain.Brain": OURS,
}
# Packages without a Brain, which take long to read.
WITHOUT_BRAINS = frozenset(sys.stdlib_module_names) | {
    "torch", "torchaudio", "torchvision", "numpy", "scipy", "pandas", "matplotlib", "sklearn",
    "transformers", "datasets", "lightning", "pytorch_lightning", "hyperpyyaml", "tqdm",
}  # fmt: skip
# Prefix of a name that is an alias in the same file, as in ``Base = sb.Brain``.
ALIAS = "="
# Names that were already looked up, each with its file.
Seen = set[tuple[Path, str]]


class Reference(NamedTuple):
    """A dotted name from an import.

    Attributes:
        dotted: Name from the top package on.
        root: Folder that contains the top package, if the import is relative.
    """

    dotted: str
    root: Path | None = None

    def joined(self, rest: str) -> Reference:
        """Returns the name of a member.

        Args:
            rest: Name of the member relative to this name. It may be empty.

        Returns:
            Full name of the member.
        """
        return Reference(f"{self.dotted}.{rest}" if rest else self.dotted, self.root)


Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, eq=False)
class FunctionSource:
    """The source of a function, and its file."""

    node: Function
    module: ModuleSource


@dataclass(frozen=True, eq=False)
class ClassSource:
    """The source of a class, and its file."""

    node: ast.ClassDef
    module: ModuleSource


Found = ClassSource | FunctionSource | str


class ModuleSource:
    """The source of a Python file.

    Args:
        path: Path of the file.

    Attributes:
        path: Path of the file.
        nodes: All nodes of the syntax tree.
        classes: Classes by name.
        functions: Top-level functions by name.
        names: References of imported and assigned names. A name may have several, as in
            ``try: from a import X``, ``except ImportError: from b import X``.
        stars: Modules from which ``*`` is imported.

    Raises:
        RecipeError: The file cannot be read, or is not valid Python.
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
        """Returns the full name of an expression such as ``sb.Brain``.

        Args:
            node: The expression.

        Returns:
            The name with its import resolved, such as ``speechbrain.Brain``. Empty if the
            expression is not a dotted name.
        """
        first, _, rest = dotted_name(node).partition(".")
        known = [r for r in self.names.get(first, []) if not r.dotted.startswith(ALIAS)]
        return (known[-1] if known else Reference(first)).joined(rest).dotted


class Modules:
    """Finds the classes and functions of names, in the script's folder and installed packages.

    Files are found by searching folders. Importing a package, even only the parent of a
    module, would run it.

    Args:
        folder: Folder of the script. It is searched first, as when Python runs the script.
    """

    def __init__(self, folder: Path) -> None:
        self._roots = [folder, *(Path(entry or ".") for entry in sys.path)]

    def resolve(
        self, module: ModuleSource, dotted: str, seen: Seen | None = None
    ) -> Found | None:
        """Finds a class or a function by its name in a file.

        Args:
            module: The file.
            dotted: Name in the file, such as ``sb.Brain``.
            seen: Names that were already looked up, because imports may be circular.

        Returns:
            The class or function, or the value of ``BRAINS`` for one of the two Brain classes.
            None if the name is another object, or is not found.
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
        """Finds a class or a function by its full name.

        Args:
            reference: The name.
            importer: File that contains the name.
            seen: Names that were already looked up.

        Returns:
            See ``resolve``.
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
        """Returns the base classes that were found.

        Args:
            cls: The class.

        Returns:
            Classes, or the values of ``BRAINS`` for the two Brain classes.
        """
        found = [self._base(cls, dotted_name(base)) for base in cls.node.bases]
        return [base for base in found if isinstance(base, (ClassSource, str))]

    def _base(self, cls: ClassSource, name: str) -> Found | None:
        if name == cls.node.name:
            # In `class Brain(Brain)` the base is the imported class.
            imported = cls.module.names.get(name, [])
            found = (self.follow(reference, cls.module.path) for reference in imported)
            return next((base for base in found if base is not None), None)
        return self.resolve(cls.module, name)

    def ancestors(self, cls: ClassSource) -> list[ClassSource | str]:
        """Returns a class and its ancestors in method resolution order.

        Args:
            cls: The class.

        Returns:
            Python's order, except for hierarchies that Python does not accept.
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
        # A base class comes after all its subclasses.
        return list(dict.fromkeys(reversed(order)))[::-1]


def dotted_name(node: ast.expr) -> str:
    """Returns the text of an expression such as ``a.b.c``.

    Args:
        node: The expression.

    Returns:
        The text, or empty for any other expression.
    """
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _files(parts: Sequence[str], roots: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Yields files that may define a name, the longest path first, with its name in them."""
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
    """Returns the folder that contains a file's top package."""
    folder = path.resolve().parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return folder


def _module(path: Path) -> ModuleSource | None:
    """Returns None for a file that this Python cannot parse: it may never be imported."""
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
