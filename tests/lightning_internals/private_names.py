"""Finds the private names of Lightning and torch that a module uses."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

PRIVATE = re.compile(r"_[A-Za-z]\w*")
OWNERS = ("lightning", "torch")
# f"_{name}" could be any name.
ANY = "_*"

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


class Use(NamedTuple):
    """A private name that the package does not define, and the line that uses it."""

    name: str
    line: int


def members(tree: ast.AST) -> set[str]:
    """The private names that the classes in a tree define.

    Args:
        tree: The code of a module or of a class.
    """
    return {name for node in ast.walk(tree) for name in _members(node) if _is_private(name)}


def foreign_uses(tree: ast.Module, namespace: Mapping[str, Any], own: set[str]) -> list[Use]:
    """The private names in a module that are not defined by the package.

    Found are imports; ``x._name``, where no class of the package has ``_name``;
    ``self._name`` and methods in a subclass of a class of Lightning's or torch's that has
    it; keywords and strings that are such a name, as for ``getattr``.

    Args:
        tree: The code of the module.
        namespace: The variables of the module, for the bases of its classes.
        own: The private names that the package defines, of which the module may know.
    """
    inherited: dict[ast.AST, set[str]] = {}
    ignored: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and isinstance(namespace.get(node.name), type):
            names = _inherited(namespace[node.name])
            inherited.update((child, names) for child in ast.walk(node))
        elif isinstance(node, ast.JoinedStr):
            ignored.update(node.values)
        elif isinstance(node, ast.Expr):
            # A docstring.
            ignored.add(node.value)
    return [
        Use(name, getattr(node, "lineno", 0))
        for node in ast.walk(tree)
        if not (node in ignored and isinstance(node, ast.Constant))
        for name in _used(node, own, inherited.get(node, set()))
    ]


def _is_private(name: str) -> bool:
    return PRIVATE.fullmatch(name) is not None


def _members(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.ClassDef):
        for part in node.body:
            if isinstance(part, FunctionNode):
                yield part.name
            yield from (t.id for t in _targets(part) if isinstance(t, ast.Name))
    for target in _targets(node):
        if isinstance(target, ast.Attribute) and _is_self(target.value):
            yield target.attr


def _targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        targets = node.targets
        return [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _inherited(cls: type) -> set[str]:
    """The private names that a class has from Lightning or torch."""
    bases = [base for base in cls.__mro__ if base.__module__.partition(".")[0] in OWNERS]
    sources = [textwrap.dedent(inspect.getsource(base)) for base in bases]
    return {name for source in sources for name in members(ast.parse(source))}


def _used(node: ast.AST, own: set[str], inherited: set[str]) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom):
        parts = (node.module or "").split(".")
        if parts[0] in OWNERS:
            yield from filter(_is_private, [*parts, *(alias.name for alias in node.names)])
    elif isinstance(node, ast.Import):
        for alias in node.names:
            parts = alias.name.split(".")
            yield from filter(_is_private, parts if parts[0] in OWNERS else [])
    elif isinstance(node, ast.Attribute):
        is_own = node.attr not in inherited if _is_self(node.value) else node.attr in own
        yield from [node.attr] if _is_private(node.attr) and not is_own else []
    elif isinstance(node, FunctionNode):
        yield from [node.name] if node.name in inherited else []
    elif isinstance(node, ast.keyword):
        yield from [node.arg] if node.arg and _is_private(node.arg) else []
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        name = node.value.rstrip(".")
        yield from [name] if _is_private(name) and name not in own else []
    elif isinstance(node, ast.JoinedStr) and node.values:
        first = node.values[0]
        yield from [ANY] if isinstance(first, ast.Constant) and first.value == "_" else []
