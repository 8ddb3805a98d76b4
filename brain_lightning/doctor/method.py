"""One method of a Brain: what it reads, calls and changes of the Brain."""

from __future__ import annotations

import ast
import contextlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .modules import dotted_name

Function = ast.FunctionDef | ast.AsyncFunctionDef
# Methods of modules themselves, a ModuleDict, which are no entries.
OF_A_MODULE_DICT = frozenset(dir(torch.nn.ModuleDict()))
EACH_ENTRY = "each entry"
# Tests that are true where several processes train, and those that say so of one.
SEVERAL = re.compile(
    r"""hasattr\(.*['"]module['"]\)|DistributedDataParallel|\bDDP\b|DataParallel"""
    r"|distributed_launch|is_initialized\(\)|world_size(\(\))? > 1"
)
ONE = re.compile(r"world_size(\(\))? (==|<=) 1|world_size(\(\))? < 2")
TRAIN = re.compile(r"Stage\.TRAIN\b")
LATER = re.compile(r"Stage\.(VALID|TEST)\b")
# Functions that want a sequence, which a wrapper of one is not.
SEQUENCES = frozenset({"len", "enumerate", "iter", "list", "tuple", "zip", "reversed"})
NO_GRADIENTS = ("no_grad", "inference_mode")


class Location(NamedTuple):
    """A line of a file."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


Locations = dict[str, list[Location]]


class EntryUse(NamedTuple):
    """What a method does with an entry of ``self.modules``, other than to call it.

    Attributes:
        entry: The entry, or ``EACH_ENTRY``.
        attribute: What is used of it; ``[]`` where it is indexed, empty where it is replaced.
        how: ``read``, ``set``, ``around`` (a call of what is in ``.module``) or ``replace``.
        text: As it is written.
        at: Where.
        processes: ``one`` or ``several`` where a test asked for that before, else empty.
        learns: Whether gradients are recorded there.
    """

    entry: str
    attribute: str
    how: str
    text: str
    at: Location
    processes: str
    learns: bool


class HparamsCall(NamedTuple):
    """A call of something in ``self.hparams``.

    Attributes:
        name: What is called, or whose method is.
        method: Its method; empty where it is called itself.
        text: As it is written.
        at: Where.
        arguments: How many arguments it is given.
        learns: Whether gradients are recorded there.
        is_entry: Whether it is in ``self.hparams.modules``.
    """

    name: str
    method: str
    text: str
    at: Location
    arguments: int
    learns: bool
    is_entry: bool


def _locations() -> Locations:
    return defaultdict(list)


@dataclass
class Method:
    """A method of a Brain, and what it does.

    Attributes:
        name: Its name.
        at: Where it begins.
        owner: The class that it is written in.
        reads: Attributes of ``self``, and where.
        sets: Attributes of ``self`` that are assigned, and where.
        calls: Methods called on anything, and where: ``backward``, ``step``…
        given: Methods of ``self`` that are called with arguments, and where.
        supers: Methods called on ``super()``, and where.
        super_in_branch: Those of them that are called under an ``if``.
        unwraps: Where ``.module`` of something else than ``self`` is read.
        entries: Entries of ``self.modules`` that are used.
        entry_uses: What is done with them other than to call them.
        hparams_calls: What is called in ``self.hparams``.
    """

    name: str
    at: Location
    owner: str
    reads: Locations = field(default_factory=_locations)
    sets: Locations = field(default_factory=_locations)
    calls: Locations = field(default_factory=_locations)
    given: Locations = field(default_factory=_locations)
    supers: Locations = field(default_factory=_locations)
    super_in_branch: set[str] = field(default_factory=set)
    unwraps: list[Location] = field(default_factory=list)
    entries: set[str] = field(default_factory=set)
    entry_uses: list[EntryUse] = field(default_factory=list)
    hparams_calls: list[HparamsCall] = field(default_factory=list)


def read_method(node: Function, owner: str, file: str) -> Method:
    """Reads a method.

    Args:
        node: The method.
        owner: The class that it is written in.
        file: The file, as it is to be shown.

    Returns:
        What it does.
    """
    method = Method(node.name, Location(file, node.lineno), owner)
    arguments = [*node.args.posonlyargs, *node.args.args]
    reader = _Reader(method, file, arguments[0].arg if arguments else "self")
    reader.read(node)
    return method


class _Reader(ast.NodeVisitor):
    """Walks a method in the order in which it is written."""

    def __init__(self, method: Method, file: str, itself: str) -> None:
        self._method = method
        self._file = file
        self._self = itself
        # Local names of entries.
        self._entries: dict[str, str] = {}
        self._processes = ""
        self._learns = True
        self._branches = 0

    def read(self, node: Function) -> None:
        """Reads all statements, its decorators apart.

        Args:
            node: The method.
        """
        self._learns = not any(_stops_gradients(d) for d in node.decorator_list)
        for statement in node.body:
            self.visit(statement)

    def _at(self, node: ast.expr) -> Location:
        return Location(self._file, node.end_lineno or node.lineno)

    @contextlib.contextmanager
    def _within(self, processes: str = "", learns: bool = True) -> Iterator[None]:
        before = self._processes, self._learns
        self._processes = processes or self._processes
        self._learns = self._learns and learns
        yield
        self._processes, self._learns = before

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        self.visit(node.test)
        then, otherwise = _processes(node.test)
        learns, learns_otherwise = _learns(node.test)
        self._branches += 1
        with self._within(then, learns):
            self._visit_all(node.body)
        with self._within(otherwise, learns_otherwise):
            self._visit_all(node.orelse)
        self._branches -= 1

    visit_IfExp = visit_If  # noqa: N815  ast's names

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        known = ""
        for value in node.values:
            with self._within(known):
                self.visit(value)
            known = _processes(value)[0] if isinstance(node.op, ast.And) else ""

    def _visit_all(self, nodes: list[ast.stmt] | ast.expr) -> None:
        for node in nodes if isinstance(nodes, list) else [nodes]:
            self.visit(node)

    def visit_With(self, node: ast.With | ast.AsyncWith) -> None:
        for item in node.items:
            self.visit(item)
        learns = not any(_stops_gradients(item.context_expr) for item in node.items)
        with self._within(learns=learns):
            self._visit_all(node.body)

    visit_AsyncWith = visit_With  # noqa: N815  ast's names

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self.visit(target)
            if isinstance(target, ast.Name):
                self._bind(target.id, self._entry(node.value))

    def visit_For(self, node: ast.For | ast.comprehension) -> None:
        self.visit(node.iter)
        names = [n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)]
        self._use_as_sequence(node.iter)
        function = node.iter.func if isinstance(node.iter, ast.Call) else node.iter
        each = dotted_name(function) in {
            f"{self._self}.modules.{name}" for name in ("values", "items")
        }
        self._bind(names[-1] if names else "", EACH_ENTRY if each else "")
        for child in ast.iter_child_nodes(node):
            if child is not node.iter:
                self.visit(child)

    visit_comprehension = visit_For

    def _visit_comprehension(self, node: ast.expr) -> None:
        """The names are bound after the expression that uses them."""
        for child in reversed(list(ast.iter_child_nodes(node))):
            self.visit(child)

    def visit_ListComp(self, node: ast.ListComp) -> None:
        self._visit_comprehension(node)

    def visit_SetComp(self, node: ast.SetComp) -> None:
        self._visit_comprehension(node)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> None:
        self._visit_comprehension(node)

    def visit_DictComp(self, node: ast.DictComp) -> None:
        self._visit_comprehension(node)

    def _bind(self, name: str, entry: str) -> None:
        if entry and self._processes != "one":
            self._entries[name] = entry
        else:
            self._entries.pop(name, None)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        method, at = self._method, self._at(node)
        if isinstance(node.value, ast.Name) and node.value.id == self._self:
            (method.reads if isinstance(node.ctx, ast.Load) else method.sets)[
                node.attr
            ].append(at)
        elif node.attr == "module":
            method.unwraps.append(at)
        if entry := self._entry(node):
            self._use_entry(entry, node)
        elif entry := self._entry(node.value):
            how = "read" if isinstance(node.ctx, ast.Load) else "set"
            self._add_use(entry, node.attr, how, node)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if entry := self._entry(node):
            self._use_entry(entry, node)
        elif entry := self._entry(node.value):
            self._add_use(entry, "[]", "read", node)
        self.generic_visit(node)

    def _use_entry(self, entry: str, node: ast.expr) -> None:
        self._method.entries.add(entry)
        if not isinstance(getattr(node, "ctx", None), ast.Load):
            self._add_use(entry, "", "replace", node)

    def visit_Call(self, node: ast.Call) -> None:
        self._read_function(node)
        name = dotted_name(node.func)
        if name in ("getattr", "hasattr") and len(node.args) > 1:
            self._read_by_name(node, name)
        if name in SEQUENCES:
            for argument in node.args:
                self._use_as_sequence(argument)
        self.generic_visit(node)

    def _use_as_sequence(self, node: ast.expr) -> None:
        if entry := self._entry(node):
            self._add_use(entry, "[]", "read", node)

    def _read_by_name(self, node: ast.Call, function: str) -> None:
        """``getattr`` and ``hasattr`` of an entry; of ``.module`` they ask for a wrapper."""
        entry, name = self._entry(node.args[0]), node.args[1]
        attribute = name.value if isinstance(name, ast.Constant) else ast.unparse(name)
        if entry and attribute != "module":
            self._add_use(entry, str(attribute), "read", node)
        elif entry and function == "getattr" and len(node.args) == 2:
            self._add_use(entry, "module", "read", node)

    def _read_function(self, node: ast.Call) -> None:
        function, at = node.func, self._at(node.func)
        if isinstance(function, (ast.Attribute, ast.Subscript)):
            self._read_hparams_call(function, at, len(node.args) + len(node.keywords))
        if not isinstance(function, ast.Attribute):
            return
        owner, method = function.value, self._method
        on_super = isinstance(owner, ast.Call) and dotted_name(owner.func) == "super"
        of_base = bool(node.args) and dotted_name(node.args[0]) == self._self
        by_class = of_base and dotted_name(owner).rpartition(".")[2][:1].isupper()
        if on_super or by_class:
            method.supers[function.attr].append(at)
            if self._branches:
                method.super_in_branch.add(function.attr)
        else:
            method.calls[function.attr].append(at)
        if dotted_name(owner) == self._self and (node.args or node.keywords):
            method.given[function.attr].append(at)
        if function.attr == "module" and (entry := self._entry(owner)):
            self._add_use(entry, "", "around", function)
        elif around := self._wrapped(owner):
            self._add_use(around, function.attr, "around", function)

    def _wrapped(self, node: ast.expr) -> str:
        """The entry whose ``.module``, or a part of that, is written."""
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            if isinstance(node, ast.Attribute) and node.attr == "module":
                return self._entry(node.value)
            node = node.value
        return ""

    def _add_use(self, entry: str, attribute: str, how: str, node: ast.expr) -> None:
        use = EntryUse(
            entry, attribute, how, ast.unparse(node), self._at(node), self._processes,
            self._learns,
        )  # fmt: skip
        self._method.entry_uses.append(use)

    def _read_hparams_call(self, function: ast.expr, at: Location, count: int) -> None:
        parts = [
            re.sub(r"\W", "", part)
            for part in re.split(r"[.\[]", ast.unparse(function))
        ]  # fmt: skip
        if parts[:2] != [self._self, "hparams"] or len(parts) < 3:
            return
        is_entry = parts[2] == "modules" and len(parts) > 3
        name, *rest = parts[3:] if is_entry else parts[2:]
        call = HparamsCall(
            name, ".".join(rest), ast.unparse(function), at, count, self._learns, is_entry
        )
        self._method.hparams_calls.append(call)

    def _entry(self, node: ast.expr) -> str:
        """The entry of ``self.modules`` that an expression is; empty where it is none."""
        modules = f"{self._self}.modules"
        match node:
            case ast.Name(name):
                return self._entries.get(name, "")
            case ast.Attribute(owner, name) if name not in OF_A_MODULE_DICT:
                return name if dotted_name(owner) == modules else ""
            case ast.Subscript(owner, ast.Constant(str(name))):
                return name if dotted_name(owner) == modules else ""
            case ast.Subscript(owner, key):
                return f"[{ast.unparse(key)}]" if dotted_name(owner) == modules else ""
            case ast.Call(ast.Name("getattr"), [owner, name, *_]):
                is_entry = dotted_name(owner) == modules
                return ast.unparse(name).strip("'\"") if is_entry else ""
        return ""


def _stops_gradients(node: ast.expr) -> bool:
    return any(name in ast.unparse(node) for name in NO_GRADIENTS)


def _processes(test: ast.expr) -> tuple[str, str]:
    """How many processes there are where a test is true, and where it is false."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        then, otherwise = _processes(test.operand)
        return otherwise, then
    if isinstance(test, ast.BoolOp):
        values = [_processes(value)[0] for value in test.values]
        known = next((value for value in values if value), "")
        return (known, "") if isinstance(test.op, ast.And) else ("", "")
    text = ast.unparse(test)
    if ONE.search(text):
        return "one", "several"
    return ("several", "one") if SEVERAL.search(text) else ("", "")


def _learns(test: ast.expr) -> tuple[bool, bool]:
    """Whether a batch may be learned from where a test is true, and where it is false."""
    match test:
        case ast.BoolOp(ast.And(), values):
            return all(_learns(value)[0] for value in values), True
        case ast.Compare(_, [ast.Eq()], [stage]) if TRAIN.search(ast.unparse(stage)):
            return True, False
        case ast.Compare(_, [ast.NotEq()], [stage]) if TRAIN.search(ast.unparse(stage)):
            return False, True
        case ast.Compare(_, [ast.Eq()], [stage]) if LATER.search(ast.unparse(stage)):
            return False, True
    return True, True
