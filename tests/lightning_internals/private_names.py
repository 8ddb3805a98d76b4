"""Finds the private names of other packages that the code of this one uses."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

PRIVATE = re.compile(r"_[A-Za-z]\w*")
FOREIGN = ("lightning", "torch")


class Use(NamedTuple):
    """A private name of another package, and the line that uses it."""

    name: str
    line: int


def is_private(name: str) -> bool:
    return PRIVATE.fullmatch(name) is not None


def members(tree: ast.Module) -> set[str]:
    """The private names that the classes of a module define."""
    return {name for node in ast.walk(tree) for name in _defined(node) if is_private(name)}


def _defined(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.ClassDef):
        for part in node.body:
            if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
                yield part.name
            for target in _targets(part):
                if isinstance(target, ast.Name):
                    yield target.id
    for target in _targets(node):
        if isinstance(target, ast.Attribute) and _is_self(target.value):
            yield target.attr


def _targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return [each for target in node.targets for each in _flat(target)]
    return [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign) else []


def _flat(target: ast.expr) -> list[ast.expr]:
    return list(target.elts) if isinstance(target, ast.Tuple) else [target]


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def inherited_names(cls: type) -> set[str]:
    """The private names that a class has from Lightning or torch."""
    bases = [base for base in cls.__mro__ if base.__module__.partition(".")[0] in FOREIGN]
    names = {name for base in bases for name in vars(base)}
    for base in bases:
        tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(base)))
        names |= members(tree)
    return {name for name in names if is_private(name)}


def foreign_uses(
    tree: ast.Module, namespace: Mapping[str, Any], own: set[str]
) -> Iterator[Use]:
    """The private names of other packages in a module.

    Args:
        tree: Its code.
        namespace: The module's variables.
        own: The private names that are defined in the package.
    """
    inherited = {
        node: inherited_names(namespace[node.name])
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and isinstance(namespace.get(node.name), type)
    }
    within = {child: names for node, names in inherited.items() for child in ast.walk(node)}
    documented = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if node not in documented:
            for name in _used(node, own, within.get(node, set())):
                yield Use(name, getattr(node, "lineno", 0))


def _used(node: ast.AST, own: set[str], inherited: set[str]) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in FOREIGN:
        parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        yield from filter(is_private, parts)
    elif isinstance(node, ast.Import):
        for alias in node.names:
            first, *parts = alias.name.split(".")
            yield from filter(is_private, parts if first in FOREIGN else [])
    elif isinstance(node, ast.Attribute) and is_private(node.attr):
        known = node.attr not in inherited if _is_self(node.value) else node.attr in own
        if not known:
            yield node.attr
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in inherited:
        yield node.name
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        name = node.value.rstrip(".")
        if is_private(name) and name not in own:
            yield name
    elif isinstance(node, ast.JoinedStr) and _begins_with_underscore(node):
        yield "_*"


def _begins_with_underscore(node: ast.JoinedStr) -> bool:
    first = node.values[0]
    return isinstance(first, ast.Constant) and first.value == "_"
