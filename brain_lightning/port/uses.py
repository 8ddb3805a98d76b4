"""Finds the uses of names of SpeechBrain that a port replaces."""

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

# A class with a base and one of these methods is assumed to be a Brain.
BRAIN_METHODS = frozenset({
    "compute_forward", "compute_objectives", "fit_batch", "evaluate_batch", "on_stage_start",
    "on_stage_end", "on_fit_batch_start", "on_fit_batch_end", "on_evaluate_start",
    "init_optimizers", "optimizers_step",
})  # fmt: skip
# Packages for which a name that ends with Brain needs no remark.
KNOWN = frozenset({"speechbrain", OURS})


class Uses(cst.CSTVisitor):
    """Reads a file. Names are resolved by scope, through all aliases.

    Args:
        wrapper: Syntax tree of the file.
        local: Names of modules in the same folder, whose classes are ported there.

    Attributes:
        replaced: Expressions such as ``sb.Stage``, with their name in brain_lightning.
        removed: Statements to remove: lines that only initialize the process group.
        brains: Classes with a Brain as a direct base.
        bases: Names of all base classes.
        has_stage: Whether the file uses or imports SpeechBrain's Stage.
        remarks: Line and text of each remark.
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
        """Returns whether the port removes the last use of an imported name.

        Args:
            name: Name in the file.
        """
        uses = {node for node, used in self._uses.items() if used == name}
        gone = {each for node in (*self.replaced, *self.removed) for each in names_in(node)}
        return bool(uses) and uses <= gone and name not in self._in_texts

    def line(self, node: cst.CSTNode) -> int:
        """Returns the first line of a node.

        Args:
            node: Any node.
        """
        position: Any = self._positions[node]
        return int(position.start.line)

    def dotted(self, node: cst.CSTNode) -> str:
        """Returns the full name of an imported expression, such as ``speechbrain.Stage``.

        Args:
            node: A name, or an attribute of a name. For other nodes the result is empty.
        """
        return next(iter(self._names(node, QualifiedNameSource.IMPORT)), "")

    def _names(self, node: cst.CSTNode, source: QualifiedNameSource) -> list[str]:
        found: Any = self.get_metadata(QualifiedNameProvider, node, set())
        return sorted(each.name for each in found if each.source is source)

    def visit_Import(self, node: cst.Import) -> bool:
        """Skips an import: its names are not uses."""
        return False

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        """Checks an import for Brains, Stage and ``*``. Its names are not uses."""
        module = get_full_name_for_node(node.module) if node.module else None
        if isinstance(node.names, cst.ImportStar) and module in MODULES:
            says = f"from {module} import * cannot be ported. Import each name that is used."
            self.remarks.append((self.line(node), says))
        elif not isinstance(node.names, cst.ImportStar):
            names = {f"{module}.{alias.evaluated_name}" for alias in node.names}
            self.has_stage |= any(IN_SCRIPTS.get(name) == "Stage" for name in names)
            for name in () if node.relative else sorted(names):
                self._check_brain(node, name)
        return False

    def visit_SimpleStatementLine(self, node: cst.SimpleStatementLine) -> None:
        """Finds the call that initializes the process group."""
        match node.body:
            case [cst.Expr(value=cst.Call(func=function))] if (
                self.dotted(function) == STARTS_PROCESS_GROUP
            ):
                self.removed |= {node, function}

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        """Finds expressions such as ``sb.Stage``."""
        name = self.dotted(node)
        if name in IN_SCRIPTS:
            self.replaced[node] = IN_SCRIPTS[name]
            self.has_stage |= IN_SCRIPTS[name] == "Stage"
        self._check_brain(node, name)
        self._check_group(node, name)
        # The name after the dot is an attribute, and not a name of this file.
        node.value.visit(self)
        return False

    def visit_Arg(self, node: cst.Arg) -> bool:
        """Skips the keyword of an argument, which is not a name of this file."""
        node.value.visit(self)
        return False

    def visit_AssignTarget(self, node: cst.AssignTarget) -> bool:
        """Finds assignments such as ``sb.Brain = ...``, which act on other modules too."""
        name = self.dotted(node.target)
        if name in IN_SCRIPTS:
            ours = f"{OURS}.{IN_SCRIPTS[name]}"
            says = f"{name} = ... is left unchanged. It does not change {ours}."
            self.remarks.append((self.line(node), says))
            for each in names_in(node):
                self._uses[each] = each.value
        return name not in IN_SCRIPTS

    def visit_Name(self, node: cst.Name) -> None:
        """Finds the uses of imported names."""
        name = self.dotted(node)
        if name:
            self._uses[node] = node.value
        self._check_group(node, name)

    def visit_Annotation(self, node: cst.Annotation) -> None:
        """Finds names in annotations that are strings. These uses stay."""
        for text in matchers.findall(node, matchers.SimpleString()):
            self._in_texts |= {
                *re.findall(r"\w+", cst.ensure_type(text, cst.SimpleString).value)
            }

    def _check_group(self, node: cst.CSTNode, name: str) -> None:
        if name == STARTS_PROCESS_GROUP and node not in self.removed:
            says = "Remove ddp_init_group, because the Trainer initializes the process group."
            self.remarks.append((self.line(node), says))

    def _check_brain(self, node: cst.CSTNode, name: str) -> None:
        """Adds one remark on a Brain that is imported from a package that is not ported."""
        root, _, attribute = name.rpartition(".")
        is_elsewhere = name and root.split(".")[0] not in {*KNOWN, *self._local, ""}
        if is_elsewhere and attribute.endswith("Brain") and name not in self._named:
            self._named.add(name)
            says = (
                f"{name} seems to be a Brain by its name, and its file is not in the script's "
                "folder. Change its base to brain_lightning.Brain where it is defined."
            )
            self.remarks.append((self.line(node), says))

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        """Finds Brains, and classes that seem to be Brains by their methods."""
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
                f"{node.name.value} seems to be a Brain by its methods, and the file of its "
                f"base {cst.Module([]).code_for_node(base)} is not in the script's folder. "
                "Change the base to brain_lightning.Brain where it is defined."
            )
            self.remarks.append((self.line(node), says))

    def _is_local(self, base: cst.CSTNode) -> bool:
        imported = self.dotted(base)
        if imported:
            return imported.startswith(".") or imported.split(".")[0] in self._local
        return isinstance(base, cst.Name) and base.value in self._classes


def names_in(node: cst.CSTNode) -> Iterator[cst.Name]:
    """Yields all names within a node.

    Args:
        node: Any node.

    Yields:
        The names.
    """
    if isinstance(node, cst.Name):
        yield node
    for child in node.children:
        yield from names_in(child)


def qualified_uses(
    wrapper: MetadataWrapper, replaced: Mapping[cst.CSTNode, str]
) -> set[cst.CSTNode]:
    """Returns the uses whose name in brain_lightning the file gives to another object.

    Args:
        wrapper: Syntax tree of the file.
        replaced: Expressions, with their name in brain_lightning.

    Returns:
        Expressions that must become ``brain_lightning.Stage`` and the like.
    """
    found = wrapper.resolve(ScopeProvider)
    taken = _taken_names({scope for scope in found.values() if isinstance(scope, Scope)})
    return {
        node
        for node, name in replaced.items()
        if name in taken or _is_bound_within(name, found.get(node))
    }


def _is_bound_within(name: str, scope: Any) -> bool:
    """Returns whether a scope, or an enclosing scope within the file, binds a name."""
    while scope is not None and not isinstance(scope, GlobalScope | BuiltinScope):
        if any(each.name == name for each in scope.assignments):
            return True
        scope = scope.parent
    return False


def _taken_names(scopes: Collection[Scope]) -> set[str]:
    """Returns the names that a file gives to objects not from brain_lightning."""
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
