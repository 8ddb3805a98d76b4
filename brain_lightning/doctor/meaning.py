"""What expressions in a method mean.

Names stand for the Brain, its modules or an entry of these; tests and contexts say how many
processes there are under them, and whether a batch is learned from.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

# Methods of modules themselves, a ModuleDict, which are no entries.
OF_A_MODULE_DICT = frozenset(dir(torch.nn.ModuleDict()))
EACH_ENTRY = "each entry"
# What an expression may stand for, beside the name of an entry.
ITSELF, MODULES = "<self>", "<self.modules>"
# Tests that are true where several processes train, and those that say so of one.
SEVERAL = re.compile(
    r"""hasattr\(.*['"]module['"]\)|DistributedDataParallel|\bDDP\b|DataParallel"""
    r"|distributed_launch|is_initialized\(\)|world_size(\(\))? > 1"
)
ONE = re.compile(r"world_size(\(\))? (==|<=) 1|world_size(\(\))? < 2")
# Tests that are true in the main process alone.
MAIN = re.compile(r"^(?!not ).*(if_main_process\(\)|\brank == 0|is_global_zero)")
TRAIN = re.compile(r"Stage\.TRAIN\b")
LATER = re.compile(r"Stage\.(VALID|TEST)\b")
NO_GRADIENTS = ("no_grad", "inference_mode")


@dataclass(frozen=True)
class Kept:
    """Attributes of a Brain that are its modules, or an entry of these.

    Attributes:
        meanings: What they stand for.
        bare: Those that ``__init__`` has kept, before an entry is in its wrapper.
    """

    meanings: Mapping[str, str] = field(default_factory=dict)
    bare: Mapping[str, str] = field(default_factory=dict)


class Names:
    """What the names of one method stand for, as far as it is read.

    Args:
        meanings: Of its parameters.
        kept: Attributes of the Brain.
    """

    def __init__(self, meanings: Mapping[str, str], kept: Kept) -> None:
        self._meanings = dict(meanings)
        self._kept = kept

    def bind(self, name: str, meaning: str) -> None:
        """Takes note of an assignment.

        Args:
            name: The name.
            meaning: What it stands for from now on; empty for something else.
        """
        self._meanings[name] = meaning

    def meaning(self, node: ast.expr) -> str:
        """What an expression stands for.

        Args:
            node: The expression.

        Returns:
            ``ITSELF``, ``MODULES``, an entry, or empty for something else.
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
        """The entry of ``self.modules`` that an expression is.

        Args:
            node: The expression.

        Returns:
            Its name; empty where it is none.
        """
        meaning = self.meaning(node)
        return "" if meaning in (ITSELF, MODULES) else meaning

    def each(self, node: ast.expr) -> str:
        """What each of a loop over an expression stands for.

        Args:
            node: The expression.

        Returns:
            ``EACH_ENTRY``, or empty for something else.
        """
        match node:
            case ast.Call(ast.Attribute(owner, "values" | "items")):
                return EACH_ENTRY if self.meaning(owner) == MODULES else ""
            case ast.Tuple(elements) | ast.List(elements):
                return EACH_ENTRY if any(self.entry(e) for e in elements) else ""
        return ""

    def bare(self, node: ast.expr) -> str:
        """The entry that an expression is, kept before it was in its wrapper.

        Args:
            node: The expression.

        Returns:
            Its name; empty where it is none.
        """
        if isinstance(node, ast.Attribute) and self.meaning(node.value) == ITSELF:
            return self._kept.bare.get(node.attr, "")
        return ""

    def _any(self, nodes: Iterable[ast.expr]) -> str:
        return next((found for node in nodes if (found := self.meaning(node))), "")

    def _of_branches(self, node: ast.IfExp) -> str:
        """What is taken in one process alone has no wrapper."""
        then, otherwise = processes(node.test)
        branches = ((then, node.body), (otherwise, node.orelse))
        return self._any(branch for count, branch in branches if count != "one")

    def _of_attribute(self, owner: str, name: str) -> str:
        if owner == ITSELF:
            return MODULES if name == "modules" else self._kept.meanings.get(name, "")
        return name if owner == MODULES and name not in OF_A_MODULE_DICT else ""

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
    """The names that a target of an assignment binds.

    Args:
        target: The target.

    Returns:
        Its names, in their order.
    """
    return [
        node.id for node in ast.walk(target)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]  # fmt: skip


def stops_gradients(node: ast.expr) -> bool:
    """Whether a context or a decorator records no gradients.

    Args:
        node: The expression.

    Returns:
        True for ``torch.no_grad()`` and its like.
    """
    return any(name in ast.unparse(node) for name in NO_GRADIENTS)


def processes(test: ast.expr) -> tuple[str, str]:
    """How many processes there are where a test is true, and where it is false.

    Args:
        test: The test.

    Returns:
        ``one``, ``several`` or empty, for each.
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
    """Whether a test is true in the main process alone.

    Args:
        test: The test.
    """
    return bool(MAIN.search(ast.unparse(test)))


def learns(test: ast.expr) -> tuple[bool, bool]:
    """Whether a batch may be learned from where a test is true, and where it is false.

    Args:
        test: The test.

    Returns:
        For each.
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
