"""Changes the imports of a ported file: adds brain_lightning's, removes unused ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import libcst as cst
from libcst import matchers
from libcst.helpers import get_full_name_for_node

from .equivalents import IN_SCRIPTS, OURS

Statements = Sequence[cst.BaseStatement]
# Modules whose import is removed if the port removes its last use.
OWN_MODULES = frozenset({"speechbrain", "speechbrain.core", "speechbrain.utils.distributed"})

# Marks a line to remove. If LibCST removed the line now, the comments above it would be lost.
GONE = cst.Pass()
DOCSTRING = matchers.SimpleStatementLine([matchers.Expr(matchers.SimpleString())])


class Split(NamedTuple):
    """The names of one import statement.

    Attributes:
        kept: Names that stay.
        ours: Names to import from brain_lightning, as ``Brain`` or ``Brain as B``.
    """

    kept: list[cst.ImportAlias]
    ours: list[str]


def import_in(statement: cst.CSTNode) -> cst.Import | cst.ImportFrom | None:
    """Returns the import statement of a line.

    Args:
        statement: Any statement.

    Returns:
        The import. None for other statements, and for lines with several statements.
    """
    if isinstance(statement, cst.SimpleStatementLine) and len(statement.body) == 1:
        found = statement.body[0]
        if isinstance(found, (cst.Import, cst.ImportFrom)):
            return found
    return None


def module_of(found: cst.ImportFrom) -> str:
    """Returns the module from which names are imported.

    Args:
        found: The import.

    Returns:
        Full name of the module, or empty for a relative import.
    """
    name = get_full_name_for_node(found.module) if found.module else None
    return "" if found.relative or name is None else name


def split(found: cst.Import | cst.ImportFrom, is_unused: Callable[[str], bool]) -> Split:
    """Splits the names of an import into names that stay, are replaced, or are removed.

    Args:
        found: The import.
        is_unused: Returns whether the port removes the last use of a name.

    Returns:
        The names that stay, and the names to import from brain_lightning.
    """
    if isinstance(found.names, cst.ImportStar):
        return Split([], [])
    kept, ours = [], []
    prefix = f"{module_of(found)}." if isinstance(found, cst.ImportFrom) else ""
    for alias in found.names:
        name = prefix + (get_full_name_for_node(alias.name) or "")
        bound = alias.evaluated_alias or alias.evaluated_name.split(".")[0]
        # `import a.b` stays, because it may be there for its side effects.
        goes = name in OWN_MODULES or bound != name.split(".")[0] or "." not in name
        if prefix and name in IN_SCRIPTS:
            ours.append(_as(IN_SCRIPTS[name], alias))
        elif not (goes and is_unused(bound)):
            kept.append(alias)
    return Split(kept, ours)


def _as(name: str, alias: cst.ImportAlias) -> str:
    other = alias.evaluated_alias
    return f"{name} as {other}" if other else name


def with_names(
    line: cst.SimpleStatementLine, names: Sequence[cst.ImportAlias]
) -> cst.SimpleStatementLine:
    """Removes names from an import, and keeps its layout.

    Args:
        line: The line of the import.
        names: The names that stay.

    Returns:
        The line, or ``GONE`` if no name stays.
    """
    found = import_in(line)
    assert found is not None
    if not names:
        return line.with_changes(body=[GONE])
    assert not isinstance(found.names, cst.ImportStar)
    last = names[-1].with_changes(comma=_end(names[-1], found.names[-1]))
    return line.with_changes(body=[found.with_changes(names=[*names[:-1], last])])


def _end(name: cst.ImportAlias, last: cst.ImportAlias) -> cst.Comma | cst.MaybeSentinel:
    """Returns the comma after a name that becomes the last one, with the name's comment."""
    mine, end = _space_after(name), _space_after(last)
    if mine is None or mine.first_line.comment is None:
        return last.comma
    changes = {} if end is None else {"indent": end.indent, "last_line": end.last_line}
    return cst.Comma(whitespace_after=mine.with_changes(**changes))


def _space_after(name: cst.ImportAlias) -> cst.ParenthesizedWhitespace | None:
    """Returns the whitespace and the comment after a name and its comma."""
    space = name.comma.whitespace_after if isinstance(name.comma, cst.Comma) else None
    return space if isinstance(space, cst.ParenthesizedWhitespace) else None


def from_ours(
    names: Collection[str], leading_lines: Sequence[cst.EmptyLine] = ()
) -> cst.SimpleStatementLine:
    """Creates an import from brain_lightning.

    Args:
        names: Names such as ``Brain`` or ``Brain as B``.
        leading_lines: Lines above the import.

    Returns:
        The line.
    """
    text = f"from {OURS} import {', '.join(sorted(names))}"
    line = cst.ensure_type(cst.parse_statement(text), cst.SimpleStatementLine)
    return line.with_changes(leading_lines=leading_lines)


def extended(line: cst.SimpleStatementLine, names: Collection[str]) -> cst.SimpleStatementLine:
    """Adds names to an import from brain_lightning, and keeps its layout.

    Args:
        line: The line of the import.
        names: Names to add, unless the import has them.

    Returns:
        The line.
    """
    found = cst.ensure_type(line.body[0], cst.ImportFrom)
    assert not isinstance(found.names, cst.ImportStar)
    there = {_as(alias.evaluated_name, alias) for alias in found.names}
    more = [name for name in sorted(names) if name not in there]
    if not more:
        return line
    if found.lpar is None and all(alias.asname is None for alias in found.names):
        return from_ours([*there, *more], line.leading_lines).with_changes(
            trailing_whitespace=line.trailing_whitespace
        )
    added = cst.ensure_type(from_ours(more).body[0], cst.ImportFrom).names
    assert not isinstance(added, cst.ImportStar)
    space = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    first = [*found.names[:-1], found.names[-1].with_changes(comma=space)]
    last = added[-1].with_changes(comma=found.names[-1].comma)
    return line.with_changes(body=[found.with_changes(names=[*first, *added[:-1], last])])


def end_of_imports(body: Statements) -> int:
    """Returns where to insert an import: after the block of imports with SpeechBrain's.

    Args:
        body: Statements of a file.

    Returns:
        Index in ``body``.
    """
    places = [n for n, statement in enumerate(body) if _names(statement)]
    first = next((n for n in places if is_speechbrains(body[n])), None)
    if first is None:
        # Without imports the new one goes after the docstring of the file.
        has_docstring = bool(body) and matchers.matches(body[0], DOCSTRING)
        first = next(iter(places), 0 if has_docstring else -1)
    end = first + 1
    while end in places:
        end += 1
    return end


def is_speechbrains(statement: cst.CSTNode) -> bool:
    """Returns whether a line imports SpeechBrain or one of its modules.

    Args:
        statement: Any statement.
    """
    return any(name.split(".")[0] == "speechbrain" for name in _names(statement))


def _names(statement: cst.CSTNode) -> list[str]:
    """Returns the modules that a line imports. A relative import is a dot."""
    parts = statement.body if isinstance(statement, cst.SimpleStatementLine) else ()
    names: list[str] = []
    for part in parts:
        if isinstance(part, cst.ImportFrom):
            names.append(module_of(part) or ".")
        elif isinstance(part, cst.Import):
            names += [alias.evaluated_name for alias in part.names]
    return names
