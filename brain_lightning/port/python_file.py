"""Ports a Python file. Its concrete syntax tree preserves comments and layout."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, TypeVar

import libcst as cst
from libcst.metadata import MetadataWrapper

from . import imports
from .by_hand import ReplaceableStep, remarks, replaceable_step
from .equivalents import OURS
from .uses import Uses, qualified_uses

# A comment that is removed together with the call that initializes the process group.
GROUP_COMMENT = re.compile("ddp|distributed|group|process|gpu|parallel|launch", re.IGNORECASE)
Line = cst.SimpleStatementLine
Block = TypeVar("Block", cst.IndentedBlock, cst.Module)


class PortedFile(NamedTuple):
    """A ported Python file.

    Attributes:
        text: Text of the file.
        brains: Names of its Brains.
        has_stage: Whether the original file used or imported SpeechBrain's Stage.
        remarks: Line in the original file and text of each remark.
        step: A ``fit_batch`` that was removed because arguments in the YAML file replace it.
    """

    text: str
    brains: list[str]
    has_stage: bool
    remarks: list[tuple[int, str]]
    step: ReplaceableStep | None


def port_python(
    text: str, local: Collection[str] = (), hparams: Sequence[Mapping[str, str]] = ()
) -> PortedFile:
    """Replaces names of SpeechBrain, and removes the call that initializes the process group.

    Args:
        text: Text of the file.
        local: Names of modules in the same folder.
        hparams: Plain hyperparameters of each YAML file of the recipe.

    Returns:
        The file with these changes and no others.
    """
    wrapper = MetadataWrapper(cst.parse_module(text))
    uses = Uses(wrapper, local)
    wrapper.visit(uses)
    step = replaceable_step(uses, ast.parse(text), hparams)
    if step is not None:
        uses.removed.add(step.method)
    qualified = qualified_uses(wrapper, uses.replaced)
    ported = wrapper.module.visit(_Rewrite(wrapper.module, uses, qualified))
    stays = [*uses.remarks, *remarks(uses, step and step.method)]
    names = [brain.name.value for brain in uses.brains]
    return PortedFile(ported.code, names, uses.has_stage, sorted(stays), step)


class _Rewrite(cst.CSTTransformer):
    """Applies the changes to the syntax tree.

    Args:
        module: Syntax tree of the file.
        uses: Uses of SpeechBrain in the file.
        qualified: Uses that need the prefix ``brain_lightning.``, because the file gives
            their name to another object.
    """

    def __init__(
        self, module: cst.Module, uses: Uses, qualified: Collection[cst.CSTNode]
    ) -> None:
        super().__init__()
        self._uses, self._qualified = uses, qualified
        self._top_level = set(module.body)
        # Names to import at the top of the file.
        self._needed = {name for n, name in uses.replaced.items() if n not in qualified}
        self._splits: dict[cst.CSTNode, imports.Split] = {
            line: imports.split(found, uses.is_unused)
            for line in _lines(module)
            if (found := _splittable(line)) is not None
        }
        for line, split in self._splits.items():
            if line in self._top_level and split.kept:
                self._needed.update(split.ours)
        self._target = self._find_target(module)
        self._merge(module)

    def _find_target(self, module: cst.Module) -> cst.CSTNode | None:
        """Returns the import to which all names are added, or that is replaced by one."""
        # A later import may come after the first use of a name.
        first = module.body[: imports.end_of_imports(module.body)]
        lines = [n for n in first if isinstance(n, Line)]
        emptied = [n for n in lines if n in self._splits and not self._splits[n].kept]
        candidates = [
            *(line for line in lines if _imports_ours(line)),
            *(line for line in emptied if self._splits[line].ours),
            *(line for line in emptied if imports.is_speechbrains(line)),
        ]
        return candidates[0] if candidates else None

    def _merge(self, module: cst.Module) -> None:
        """Merges the lines that would become imports from brain_lightning."""
        for line in module.body if self._target is not None else ():
            split = self._splits.get(line)
            if split and split.ours and not split.kept and line is not self._target:
                self._needed.update(split.ours)
                self._splits[line] = imports.Split([], [])

    def leave_Attribute(
        self, original_node: cst.Attribute, updated_node: cst.Attribute
    ) -> cst.BaseExpression:
        """Replaces ``sb.Stage`` by ``Stage``."""
        name = self._uses.replaced.get(original_node)
        if name is None:
            return updated_node
        ours = cst.Name(name)
        is_qualified = original_node in self._qualified
        found = cst.Attribute(cst.Name(OURS), ours) if is_qualified else ours
        return found.with_changes(lpar=updated_node.lpar, rpar=updated_node.rpar)

    def leave_SimpleStatementLine(
        self, original_node: Line, updated_node: Line
    ) -> cst.BaseStatement | cst.FlattenSentinel[cst.BaseStatement]:
        """Changes imports, and marks the lines to remove."""
        if original_node in self._uses.removed:
            return updated_node.with_changes(
                body=[imports.GONE],
                leading_lines=_without_its_comment(updated_node.leading_lines),
            )
        split = self._splits.get(original_node)
        if split is None:
            is_target = original_node is self._target
            return imports.extended(updated_node, self._needed) if is_target else updated_node
        return self._import(original_node, updated_node, split)

    def _import(
        self, original: cst.CSTNode, line: Line, split: imports.Split
    ) -> cst.BaseStatement | cst.FlattenSentinel[cst.BaseStatement]:
        found = imports.import_in(line)
        if split.kept or not split.ours:
            if original is self._target and self._needed:
                return imports.from_ours(self._needed, line.leading_lines)
            kept = _kept(found, split)
            line = imports.with_names(line, kept) if len(kept) < _count(found) else line
            if split.ours and original not in self._top_level:
                return cst.FlattenSentinel([line, imports.from_ours(split.ours)])
            return line
        assert isinstance(found, cst.ImportFrom)
        moved = found.with_changes(module=cst.Name(OURS))
        line = line.with_changes(body=[moved])
        return imports.extended(line, self._needed) if original is self._target else line

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.BaseStatement | cst.RemovalSentinel:
        """Removes a method."""
        gone = original_node in self._uses.removed
        return cst.RemoveFromParent() if gone else updated_node

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.BaseSuite:
        """Removes the marked lines of a block. If no line is left, adds a ``pass``."""
        return _without_gone(updated_node)

    def leave_Module(self, original_node: cst.Module, updated_node: cst.Module) -> cst.Module:
        """Imports the names that no line of the file imports yet."""
        module = _without_gone(updated_node)
        new: list[Line] = []
        place = imports.end_of_imports(module.body)
        if self._qualified:
            new.append(cst.ensure_type(cst.parse_statement(f"import {OURS}"), Line))
        if self._needed and self._target is None:
            new.append(imports.from_ours(self._needed))
            # After other imports a blank line separates the new group.
            above = [cst.EmptyLine(indent=False)] if place else []
            new[0] = new[0].with_changes(leading_lines=above)
        return module.with_changes(body=[*module.body[:place], *new, *module.body[place:]])


def _lines(module: cst.Module) -> list[Line]:
    found: list[Line] = []
    waiting: list[cst.CSTNode] = [module]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Line):
            found.append(node)
        elif not isinstance(node, cst.BaseExpression):
            waiting += node.children
    return found


def _splittable(line: cst.CSTNode) -> cst.Import | cst.ImportFrom | None:
    found = imports.import_in(line)
    has_names = found is not None and not isinstance(found.names, cst.ImportStar)
    return found if has_names and not _imports_ours(line) else None


def _imports_ours(line: cst.CSTNode) -> bool:
    found = imports.import_in(line)
    return (
        isinstance(found, cst.ImportFrom)
        and imports.module_of(found) == OURS
        and not isinstance(found.names, cst.ImportStar)
    )


def _kept(
    found: cst.Import | cst.ImportFrom | None, split: imports.Split
) -> list[cst.ImportAlias]:
    """Returns the names that stay, as nodes of the current tree."""
    assert found is not None
    assert not isinstance(found.names, cst.ImportStar)
    kept = [alias.evaluated_name for alias in split.kept]
    return [alias for alias in found.names if alias.evaluated_name in kept]


def _count(found: cst.Import | cst.ImportFrom | None) -> int:
    assert found is not None
    assert not isinstance(found.names, cst.ImportStar)
    return len(found.names)


def _without_its_comment(lines: Sequence[cst.EmptyLine]) -> Sequence[cst.EmptyLine]:
    """Removes the comment about the process group from the lines above its call."""
    blank = [n for n, line in enumerate(lines) if line.comment is None]
    start = blank[-1] + 1 if blank else 0
    comments = [line.comment.value for line in lines[start:] if line.comment]
    return lines[:start] if any(map(GROUP_COMMENT.search, comments)) else lines


def _without_gone(block: Block) -> Block:
    """Removes the marked lines of a block, and keeps the lines above them."""
    kept: list[cst.BaseStatement] = []
    above: list[cst.EmptyLine] = []
    for statement in block.body:
        if isinstance(statement, Line) and statement.body[0] is imports.GONE:
            above += statement.leading_lines
            continue
        kept.append(_below(above, statement) if above else statement)
        above = []
    if not kept and block.body and isinstance(block, cst.IndentedBlock):
        return block.with_changes(body=[Line([cst.Pass()], leading_lines=above)])
    return block.with_changes(body=kept, footer=[*above, *block.footer])


def _below(above: Sequence[cst.EmptyLine], statement: cst.BaseStatement) -> cst.BaseStatement:
    """Adds lines above a statement. Two adjacent blank lines become one."""
    lines: Sequence[cst.EmptyLine] = getattr(statement, "leading_lines", ())
    if above[-1].comment is None and lines and lines[0].comment is None:
        above = above[:-1]
    return statement.with_changes(leading_lines=[*above, *lines])
