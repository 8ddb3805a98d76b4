"""The meaning of expressions in a method.

An expression may be the Brain, its modules or one of their entries. Tests and context managers
tell how many processes there are, and whether gradients are recorded.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

# Attributes of ``self.modules``, a ModuleDict, that are not entries.
MODULE_DICT_ATTRIBUTES = frozenset(dir(torch.nn.ModuleDict()))
EACH_ENTRY = "each entry"
# Meanings of an expression, besides the name of an entry.
ITSELF, MODULES = "<self>", "<self.modules>"
# Tests that are true only if several processes train, and only if one process trains.
SEVERAL = re.compile(
    r"""hasattr\(.*['"]module['"]\)|DistributedDataParallel|\bDDP\b|DataParallel"""
    r"|distributed_launch|is_initialized\(\)|world_size(\(\))? > 1"
)
ONE = re.compile(r"world_size(\(\))? (==|<=) 1|world_size(\(\))? < 2")
# Tests that are true only in the main process.
MAIN = re.compile(r"^(?!not ).*(if_main_process\(\)|\brank == 0|is_global_zero)")
TRAIN = re.compile(r"Stage\.TRAIN\b")
LATER = re.compile(r"Stage\.(VALID|TEST)\b")
NO_GRADIENTS = ("no_grad", "inference_mode")


@dataclass(frozen=True)
class Kept:
    """Attributes of a Brain that refer to its modules or to one of their entries.

    Attributes:
        meanings: Meaning of each attribute.
        bare: Meaning of the attributes that ``__init__`` assigns, before entries are wrapped.
    """

    meanings: Mapping[str, str] = field(default_factory=dict)
    bare: Mapping[str, str] = field(default_factory=dict)


class Names:
    """The meanings of the names in one method, up to the statement that is read.

    Args:
        meanings: Meanings of the parameters.
        kept: Attributes of the Brain.
    """

    def __init__(self, meanings: Mapping[str, str], kept: Kept) -> None:
        self._meanings = dict(meanings)
        self._kept = kept

    def bind(self, name: str, meaning: str) -> None:
        """Records an assignment.

        Args:
            name: The assigned name.
            meaning: Meaning of the name from now on, or empty for any other object.
        """
        self._meanings[name] = meaning

    def meaning(self, node: ast.expr) -> str:
        """Returns the meaning of an expression.

        Args:
            node: The expression.

        Returns:
            ``ITSELF``, ``MODULES``, the name of an entry, or empty for any other object.
        """
        match node:
            case ast.Name(name):
                return self._meanings.get(name, "")
            case ast.NamedExpr(value=value):
                return self.meaning(value)
            case ast.IfExp():
                return self._of_branches(node)
            case ast.BoolOp(values=values):
                return self._any(values)
            case ast.Attribute(owner, name):
                return self._of_attribute(self.meaning(owner), name)
            case ast.Subscript(owner, key):
                return self._key(owner, key)
            case ast.Call():
                return self._of_call(node)
        return ""

    def entry(self, node: ast.expr) -> str:
        """Returns the entry of ``self.modules`` to which an expression refers.

        Args:
            node: The expression.

        Returns:
            Name of the entry, or empty if the expression is not an entry.
        """
        meaning = self.meaning(node)
        return "" if meaning in (ITSELF, MODULES) else meaning

    def each(self, node: ast.expr) -> str:
        """Returns the meaning of the loop variable in a loop over an expression.

        Args:
            node: The expression.

        Returns:
            ``EACH_ENTRY``, or empty for any other object.
        """
        match node:
            case ast.Call(ast.Attribute(owner, "values" | "items")):
                return EACH_ENTRY if self.meaning(owner) == MODULES else ""
            case ast.Tuple(elements) | ast.List(elements):
                return EACH_ENTRY if any(self.entry(e) for e in elements) else ""
        return ""

    def bare(self, node: ast.expr) -> str:
        """Returns the entry to which an expression refers without its wrapper.

        Args:
            node: The expression.

        Returns:
            Name of an entry that ``__init__`` assigned to an attribute, or empty.
        """
        if isinstance(node, ast.Attribute) and self.meaning(node.value) == ITSELF:
            return self._kept.bare.get(node.attr, "")
        return ""

    def _any(self, nodes: Iterable[ast.expr]) -> str:
        return next((found for node in nodes if (found := self.meaning(node))), "")

    def _of_branches(self, node: ast.IfExp) -> str:
        """Ignores a branch that is taken only in a single process, which has no wrapper."""
        then, otherwise = processes(node.test)
        branches = ((then, node.body), (otherwise, node.orelse))
        return self._any(branch for count, branch in branches if count != "one")

    def _of_attribute(self, owner: str, name: str) -> str:
        if owner == ITSELF:
            return MODULES if name == "modules" else self._kept.meanings.get(name, "")
        return name if owner == MODULES and name not in MODULE_DICT_ATTRIBUTES else ""

    def _key(self, owner: ast.expr, key: ast.expr) -> str:
        if self.meaning(owner) != MODULES:
            return ""
        named = isinstance(key, ast.Constant) and isinstance(key.value, str)
        return str(key.value) if named else f"[{ast.unparse(key)}]"  # type: ignore[attr-defined]

    def _of_call(self, node: ast.Call) -> str:
        match node:
            case ast.Call(ast.Name("getattr"), [owner, name, *_]):
                text = ast.unparse(name).strip("'\"")
                return self._of_attribute(self.meaning(owner), text)
            case ast.Call(ast.Attribute(owner, "get"), [key, *_]):
                return self._key(owner, key)
            case ast.Call(ast.Name("dict"), [of]):
                inner = of.func if isinstance(of, ast.Call) else of
                is_items = isinstance(inner, ast.Attribute) and inner.attr == "items"
                owner = inner.value if isinstance(inner, ast.Attribute) and is_items else of
                return MODULES if self.meaning(owner) == MODULES else ""
        return ""


def names_in(target: ast.expr) -> list[str]:
    """Returns the names that the target of an assignment binds.

    Args:
        target: The target.

    Returns:
        The names in the order of the source.
    """
    return [
        node.id for node in ast.walk(target)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]  # fmt: skip


def stops_gradients(node: ast.expr) -> bool:
    """Returns whether a context manager or a decorator disables gradients.

    Args:
        node: The expression.

    Returns:
        True for ``torch.no_grad()`` and ``torch.inference_mode()``.
    """
    return any(name in ast.unparse(node) for name in NO_GRADIENTS)


def processes(test: ast.expr) -> tuple[str, str]:
    """Returns how many processes there are if a test is true, and if it is false.

    Args:
        test: The test.

    Returns:
        For each case ``one``, ``several``, or empty if it is not known.
    """
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        then, otherwise = processes(test.operand)
        return otherwise, then
    if isinstance(test, ast.BoolOp):
        values = [processes(value)[0] for value in test.values]
        known = next((value for value in values if value), "")
        return (known, "") if isinstance(test.op, ast.And) else ("", "")
    text = ast.unparse(test)
    if ONE.search(text):
        return "one", "several"
    return ("several", "one") if SEVERAL.search(text) else ("", "")


def is_on_main(test: ast.expr) -> bool:
    """Returns whether a test is true only in the main process.

    Args:
        test: The test.
    """
    return bool(MAIN.search(ast.unparse(test)))


def learns(test: ast.expr) -> tuple[bool, bool]:
    """Returns whether the stage may be TRAIN if a test is true, and if it is false.

    Args:
        test: The test.

    Returns:
        One value for each case.
    """
    match test:
        case ast.BoolOp(ast.And(), values):
            return all(learns(value)[0] for value in values), True
        case ast.Compare(_, [ast.Eq()], [stage]) if TRAIN.search(ast.unparse(stage)):
            return True, False
        case ast.Compare(_, [ast.NotEq()], [stage]) if TRAIN.search(ast.unparse(stage)):
            return False, True
        case ast.Compare(_, [ast.Eq()], [stage]) if LATER.search(ast.unparse(stage)):
            return False, True
    return True, True
