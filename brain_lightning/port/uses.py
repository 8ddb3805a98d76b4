"""What a Python file uses of SpeechBrain's that ours has too, and where."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import libcst as cst
from libcst import matchers
from libcst.helpers import get_full_name_for_node
from libcst.metadata import (
    Assignment,
    BuiltinScope,
    GlobalScope,
    ImportAssignment,
    MetadataWrapper,
    PositionProvider,
    QualifiedNameProvider,
    QualifiedNameSource,
    Scope,
    ScopeProvider,
)

from .equivalents import BRAINS, IN_SCRIPTS, MODULES, OURS, STARTS_PROCESS_GROUP

# A class with a base and one of these is meant to be a Brain.
BRAIN_METHODS = frozenset({
    "compute_forward", "compute_objectives", "fit_batch", "evaluate_batch", "on_stage_start",
    "on_stage_end", "on_fit_batch_start", "on_fit_batch_end", "on_evaluate_start",
    "init_optimizers", "optimizers_step",
})  # fmt: skip
# Theirs are no Brains, whatever they are called.
KNOWN = frozenset({"speechbrain", OURS})


class Uses(cst.CSTVisitor):
    """Reads a file; names are resolved by scope, whatever their alias is.

    Args:
        wrapper: The file.
        local: Names of modules beside the file: their classes are ported there.

    Attributes:
        replaced: Expressions such as ``sb.Stage``, and their name in ours.
        removed: Statements that go: lines that do nothing but start the process group.
        brains: The classes that are subclasses of a Brain as they are written.
        bases: The names of all classes that others are subclasses of.
        has_stage: Whether it uses SpeechBrain's Stage, or imports it for others.
        remarks: Lines, and what stays on them.
    """

    METADATA_DEPENDENCIES = (QualifiedNameProvider,)

    def __init__(self, wrapper: MetadataWrapper, local: Collection[str] = ()) -> None:
        super().__init__()
        self._positions = wrapper.resolve(PositionProvider)
        self._local = local
        self._classes: set[str] = set()
        self._named: set[str] = set()
        self.replaced: dict[cst.CSTNode, str] = {}
        self.removed: set[cst.CSTNode] = set()
        self._uses: dict[cst.CSTNode, str] = {}
        self._in_texts: set[str] = set()
        self.brains: list[cst.ClassDef] = []
        self.bases: set[str] = set()
        self.has_stage = False
        self.remarks: list[tuple[int, str]] = []

    def is_unused(self, name: str) -> bool:
        """Whether the port takes the last use of an imported name.

        Args:
            name: The name as the file has it.
        """
        uses = {node for node, used in self._uses.items() if used == name}
        gone = {each for node in (*self.replaced, *self.removed) for each in names_in(node)}
        return bool(uses) and uses <= gone and name not in self._in_texts

    def line(self, node: cst.CSTNode) -> int:
        """The line that a node begins on.

        Args:
            node: Any.
        """
        position: Any = self._positions[node]
        return int(position.start.line)

    def dotted(self, node: cst.CSTNode) -> str:
        """The full name of an imported expression, ``speechbrain.Stage``; else nothing.

        Args:
            node: A name, or an attribute of one.
        """
        return next(iter(self._names(node, QualifiedNameSource.IMPORT)), "")

    def _names(self, node: cst.CSTNode, source: QualifiedNameSource) -> list[str]:
        found: Any = self.get_metadata(QualifiedNameProvider, node, set())
        return sorted(each.name for each in found if each.source is source)

    def visit_Import(self, node: cst.Import) -> bool:
        """Names in an import are no uses."""
        return False

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        """Names in an import are no uses; of ``*`` nobody knows what is used."""
        module = get_full_name_for_node(node.module) if node.module else None
        if isinstance(node.names, cst.ImportStar) and module in MODULES:
            says = f"from {module} import *: write out Brain, Stage and what else is used"
            self.remarks.append((self.line(node), says))
        elif not isinstance(node.names, cst.ImportStar):
            names = {f"{module}.{alias.evaluated_name}" for alias in node.names}
            self.has_stage |= any(IN_SCRIPTS.get(name) == "Stage" for name in names)
            for name in () if node.relative else sorted(names):
                self._check_brain(node, name)
        return False

    def visit_SimpleStatementLine(self, node: cst.SimpleStatementLine) -> None:
        """Finds the call that starts the process group."""
        match node.body:
            case [cst.Expr(value=cst.Call(func=function))] if (
                self.dotted(function) == STARTS_PROCESS_GROUP
            ):
                self.removed |= {node, function}

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        """Finds ``sb.Stage`` and the like."""
        name = self.dotted(node)
        if name in IN_SCRIPTS:
            self.replaced[node] = IN_SCRIPTS[name]
            self.has_stage |= IN_SCRIPTS[name] == "Stage"
        self._check_brain(node, name)
        self._check_group(node, name)
        # What comes after the dot is no name of this file.
        node.value.visit(self)
        return False

    def visit_Arg(self, node: cst.Arg) -> bool:
        """A keyword is no name of this file."""
        node.value.visit(self)
        return False

    def visit_AssignTarget(self, node: cst.AssignTarget) -> bool:
        """``sb.Brain = ...`` replaces it for others too."""
        name = self.dotted(node.target)
        if name in IN_SCRIPTS:
            says = f"{name} is set here, which stays: ours is {OURS}.{IN_SCRIPTS[name]}"
            self.remarks.append((self.line(node), says))
            for each in names_in(node):
                self._uses[each] = each.value
        return name not in IN_SCRIPTS

    def visit_Name(self, node: cst.Name) -> None:
        """Finds the uses of what is imported."""
        name = self.dotted(node)
        if name:
            self._uses[node] = node.value
        self._check_group(node, name)

    def visit_Annotation(self, node: cst.Annotation) -> None:
        """A type that is written as a text is a use that stays."""
        for text in matchers.findall(node, matchers.SimpleString()):
            self._in_texts |= {
                *re.findall(r"\w+", cst.ensure_type(text, cst.SimpleString).value)
            }

    def _check_group(self, node: cst.CSTNode, name: str) -> None:
        if name == STARTS_PROCESS_GROUP and node not in self.removed:
            says = "ddp_init_group: take it out, for the Trainer starts the process group"
            self.remarks.append((self.line(node), says))

    def _check_brain(self, node: cst.CSTNode, name: str) -> None:
        """Names, once, a Brain that is imported from where nothing is ported."""
        root, _, attribute = name.rpartition(".")
        is_elsewhere = name and root.split(".")[0] not in {*KNOWN, *self._local, ""}
        if is_elsewhere and attribute.endswith("Brain") and name not in self._named:
            self._named.add(name)
            says = (
                f"{name} is a Brain by its name, and is in no file beside the script: "
                "give it brain_lightning.Brain where it is defined"
            )
            self.remarks.append((self.line(node), says))

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        """Finds Brains, and what should be one and is not known to be."""
        self._classes.add(node.name.value)
        bases = [base.value for base in node.bases]
        self.bases |= {base.value for base in bases if isinstance(base, cst.Name)}
        if any(self.dotted(base) in BRAINS for base in bases):
            self.brains.append(node)
            return
        methods = {n.name.value for n in node.body.body if isinstance(n, cst.FunctionDef)}
        if not BRAIN_METHODS & methods or any(self._is_local(base) for base in bases):
            return
        for base in bases[:1]:
            if self.dotted(base) in self._named:
                continue
            self._named.add(self.dotted(base))
            says = (
                f"{node.name.value} is a Brain by its methods, and its base "
                f"{cst.Module([]).code_for_node(base)} is in no file beside the script: "
                "give it brain_lightning.Brain where it is defined"
            )
            self.remarks.append((self.line(node), says))

    def _is_local(self, base: cst.CSTNode) -> bool:
        imported = self.dotted(base)
        if imported:
            return imported.startswith(".") or imported.split(".")[0] in self._local
        return isinstance(base, cst.Name) and base.value in self._classes


def names_in(node: cst.CSTNode) -> Iterator[cst.Name]:
    """Every name within a node.

    Args:
        node: Any.

    Returns:
        The names.
    """
    if isinstance(node, cst.Name):
        yield node
    for child in node.children:
        yield from names_in(child)


def qualified_uses(
    wrapper: MetadataWrapper, replaced: Mapping[cst.CSTNode, str]
) -> set[cst.CSTNode]:
    """Uses of what ours has too, where its name is another's, or a function's own.

    Args:
        wrapper: The file.
        replaced: Expressions, and their name in ours.

    Returns:
        Those that have to become ``brain_lightning.Stage`` and the like.
    """
    found = wrapper.resolve(ScopeProvider)
    taken = _taken_names({scope for scope in found.values() if isinstance(scope, Scope)})
    return {
        node
        for node, name in replaced.items()
        if name in taken or _is_bound_within(name, found.get(node))
    }


def _is_bound_within(name: str, scope: Any) -> bool:
    """Whether a scope, or one around it, binds a name before the file itself does."""
    while scope is not None and not isinstance(scope, GlobalScope | BuiltinScope):
        if any(each.name == name for each in scope.assignments):
            return True
        scope = scope.parent
    return False


def _taken_names(scopes: Collection[Scope]) -> set[str]:
    """Names that a file gives to something else than to what ours has."""
    assignments = {a for scope in scopes for a in scope.assignments}
    return {
        each.name
        for each in assignments
        if isinstance(each, Assignment) and not _is_of_ours(each)
    }


def _is_of_ours(assignment: Assignment) -> bool:
    if not isinstance(assignment, ImportAssignment):
        return False
    names = {n.name for n in assignment.get_qualified_names_for(assignment.name)}
    return any(name in IN_SCRIPTS or name.startswith(f"{OURS}.") for name in names)
