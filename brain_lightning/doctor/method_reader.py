"""Reads one method of a Brain, or one function to which the Brain is passed."""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Iterator

from .meaning import (
    ITSELF,
    MODULES,
    Kept,
    Names,
    is_on_main,
    learns,
    names_in,
    processes,
    stops_gradients,
)
from .method import EntryUse, Handover, HparamsCall, Location, Method
from .modules import dotted_name

Function = ast.FunctionDef | ast.AsyncFunctionDef
# Functions that need a sequence. A wrapped ModuleList is not a sequence.
SEQUENCES = frozenset({"len", "enumerate", "iter", "list", "tuple", "zip", "reversed"})

# Methods that all ranks must call together if modules are sharded.
SAVING = frozenset({"state_dict", "save_checkpoint", "save_and_keep_only"})


def read_method(node: Function, owner: str, file: str, kept: Kept | None = None) -> Method:
    """Reads a method.

    Args:
        node: The method.
        owner: Name of the class that defines it.
        file: Name of the file to show in locations.
        kept: Meanings of attributes of the Brain.

    Returns:
        What the method does.
    """
    first = next(iter(_parameters(node)), "self")
    method = Method(node.name, Location(file, node.lineno), owner)
    _Reader(method, first, Names({first: ITSELF}, kept or Kept())).read(node)
    return method


def read_function(node: Function, file: str, handover: Handover, kept: Kept) -> Method:
    """Reads a function to which the Brain or its modules are passed.

    Args:
        node: The function.
        file: Name of the file to show in locations.
        handover: The call of the function.
        kept: Meanings of attributes of the Brain.

    Returns:
        What the function does.
    """
    parameters = dict(enumerate(_parameters(node)))
    given = {parameters.get(key, "") if isinstance(key, int) else key: meaning
             for key, meaning in handover.given.items()}  # fmt: skip
    itself = next((name for name, meaning in given.items() if meaning == ITSELF), "")
    method = Method(node.name, Location(file, node.lineno), "")
    reader = _Reader(method, itself, Names(given, kept))
    reader.read(node, handover.processes, handover.learns)
    return method


def _parameters(node: Function) -> list[str]:
    return [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]


class _Reader(ast.NodeVisitor):
    """Visits the nodes of a method in the order of the source."""

    def __init__(self, method: Method, itself: str, names: Names) -> None:
        self._method = method
        self._file = method.at.file
        self._self = itself
        self._names = names
        self._entry = names.entry
        self._processes = ""
        self._learns = True
        self._is_on_main = False
        self._branches = 0

    def read(self, node: Function, count: str = "", learned: bool = True) -> None:
        """Reads all statements of a method. Of its decorators, only ``no_grad`` matters.

        Args:
            node: The method.
            count: ``processes`` of its call, see ``EntryUse``.
            learned: Whether its caller records gradients.
        """
        self._processes = count
        self._learns = learned and not any(stops_gradients(d) for d in node.decorator_list)
        for statement in node.body:
            self.visit(statement)

    def _at(self, node: ast.expr) -> Location:
        return Location(self._file, node.end_lineno or node.lineno)

    @contextlib.contextmanager
    def _within(self, count: str = "", learned: bool = True) -> Iterator[None]:
        before = self._processes, self._learns
        self._processes = count or self._processes
        self._learns = self._learns and learned
        yield
        self._processes, self._learns = before

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        self.visit(node.test)
        then, otherwise = processes(node.test)
        learned, learned_otherwise = learns(node.test)
        self._branches += 1
        before = self._is_on_main
        self._is_on_main = before or is_on_main(node.test)
        with self._within(then, learned):
            self._visit_all(node.body)
        self._is_on_main = before
        with self._within(otherwise, learned_otherwise):
            self._visit_all(node.orelse)
        self._branches -= 1

    visit_IfExp = visit_If  # noqa: N815  ast's names

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        known = ""
        for value in node.values:
            with self._within(known):
                self.visit(value)
            known = processes(value)[0] if isinstance(node.op, ast.And) else ""

    def _visit_all(self, nodes: list[ast.stmt] | ast.expr) -> None:
        for node in nodes if isinstance(nodes, list) else [nodes]:
            self.visit(node)

    def visit_With(self, node: ast.With | ast.AsyncWith) -> None:
        for item in node.items:
            self.visit(item)
        learned = not any(stops_gradients(item.context_expr) for item in node.items)
        with self._within(learned=learned):
            self._visit_all(node.body)

    visit_AsyncWith = visit_With  # noqa: N815  ast's names

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self.visit(target)
            self._assign(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if node.value is not None:
            self._assign(node.target, node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        self._assign(node.target, node.value)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        match target, value:
            case ast.Tuple(names) | ast.List(names), ast.Tuple(values) | ast.List(values):
                for element, each in zip(names, values, strict=False):
                    self._assign(element, each)
            case ast.Name(name), _:
                self._bind(name, self._names.meaning(value))
            case ast.Attribute(owner, name), _ if self._names.meaning(owner) == ITSELF:
                if (meaning := self._names.meaning(value)) not in ("", ITSELF):
                    self._method.keeps[name] = meaning
            case _:
                for bound in names_in(target):
                    self._bind(bound, "")

    def visit_For(self, node: ast.For | ast.comprehension) -> None:
        self.visit(node.iter)
        self._use_as_sequence(node.iter)
        names = names_in(node.target)
        self._bind(names[-1] if names else "", self._names.each(node.iter))
        for child in ast.iter_child_nodes(node):
            if child is not node.iter:
                self.visit(child)

    visit_comprehension = visit_For

    def _visit_comprehension(self, node: ast.expr) -> None:
        """Visits the loops first: they bind the names that the expression uses."""
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

    def _bind(self, name: str, meaning: str) -> None:
        is_entry = meaning not in (ITSELF, MODULES)
        self._names.bind(name, "" if is_entry and self._processes == "one" else meaning)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        method, at = self._method, self._at(node)
        of_itself = self._names.meaning(node.value) == ITSELF
        if of_itself:
            (method.reads if isinstance(node.ctx, ast.Load) else method.sets)[
                node.attr
            ].append(at)
        elif node.attr == "module":
            method.unwraps.append(at)
        if kept := self._names.bare(node.value):
            self._add_use(kept, node.attr, "kept", node)
            return
        if of_itself:
            self._use_kept(node)
        elif entry := self._entry(node):
            self._use_entry(entry, node)
        elif entry := self._entry(node.value):
            how = "read" if isinstance(node.ctx, ast.Load) else "set"
            self._add_use(entry, node.attr, how, node)
        self.generic_visit(node)

    def _use_kept(self, node: ast.Attribute) -> None:
        entry = self._names.bare(node)
        if entry and isinstance(node.ctx, ast.Load):
            self._add_use(entry, "", "kept", node)

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
        self._read_part(node.func)
        self._read_saving(node.func)
        self._read_handover(node)
        name = dotted_name(node.func)
        if name in ("getattr", "hasattr") and len(node.args) > 1:
            self._read_by_name(node, name)
        if name in SEQUENCES:
            for argument in node.args:
                self._use_as_sequence(argument)
        self.generic_visit(node)

    def _read_handover(self, node: ast.Call) -> None:
        meaning, function = self._names.meaning, node.func
        owner = function.value if isinstance(function, ast.Attribute) else None
        of_itself = owner is not None and meaning(owner) == ITSELF
        values: list[tuple[int | str, ast.expr]] = [*enumerate(node.args, int(of_itself))]
        values += [(keyword.arg or "", keyword.value) for keyword in node.keywords]
        given = {key: found for key, value in values if (found := meaning(value))}
        if not given or self._is_of_base(node):
            return
        name = dotted_name(function)
        if of_itself:
            given[0], name = ITSELF, f"self.{name.rpartition('.')[2]}"
        handover = Handover(name, given, self._at(function), self._processes, self._learns)
        self._method.handovers.append(handover)

    def _is_of_base(self, node: ast.Call) -> bool:
        """Returns whether a call is ``super().fit(...)`` or ``Base.fit(self, ...)``."""
        if not isinstance(node.func, ast.Attribute):
            return False
        owner = node.func.value
        on_super = isinstance(owner, ast.Call) and dotted_name(owner.func) == "super"
        of_base = bool(node.args) and dotted_name(node.args[0]) == self._self
        by_class = of_base and dotted_name(owner).rpartition(".")[2][:1].isupper()
        return on_super or by_class

    def _use_as_sequence(self, node: ast.expr) -> None:
        if entry := self._entry(node):
            self._add_use(entry, "[]", "read", node)

    def _read_by_name(self, node: ast.Call, function: str) -> None:
        """Reads ``getattr`` and ``hasattr`` of an entry. With ``module`` they unwrap it."""
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
        method = self._method
        if isinstance(function, ast.Name):
            method.calls[function.id].append(at)
        if not isinstance(function, ast.Attribute):
            return
        owner = function.value
        if function.attr == "step" and "opt" in ast.unparse(owner).lower():
            method.optimizer_steps.append(at)
        if self._is_of_base(node):
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

    def _read_saving(self, function: ast.expr) -> None:
        is_saving = isinstance(function, ast.Attribute) and function.attr in SAVING
        if is_saving and self._is_on_main:
            self._method.on_main.append((ast.unparse(function), self._at(function)))

    def _read_part(self, function: ast.expr) -> None:
        """Reads a call of a method or a part of an entry, with or without its wrapper."""
        path: list[str] = []
        node = function
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            path.insert(0, node.attr if isinstance(node, ast.Attribute) else "[]")
            node = node.value
            if entry := self._entry(node):
                inner = ".".join(path).removeprefix("module").removeprefix(".")
                self._add_use(entry, inner, "part", function)
                return

    def _wrapped(self, node: ast.expr) -> str:
        """Returns the entry whose ``.module``, or a part of it, is used."""
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
