"""The imports of a file that is ported: ours come, what nobody uses any more goes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import libcst as cst
from libcst import matchers
from libcst.helpers import get_full_name_for_node

from .equivalents import IN_SCRIPTS, OURS

Statements = Sequence[cst.BaseStatement]
# Modules of which an import goes where nobody uses it any more.
OWN_MODULES = frozenset({"speechbrain", "speechbrain.core", "speechbrain.utils.distributed"})

# Stands on a line that goes: LibCST would drop an empty line with the comments above it.
GONE = cst.Pass()
DOCSTRING = matchers.SimpleStatementLine([matchers.Expr(matchers.SimpleString())])


class Split(NamedTuple):
    """The names of one import.

    Attributes:
        kept: Those that stay as they are.
        ours: Those that are to be imported from ours, as ``Brain`` or ``Brain as B``.
    """

    kept: list[cst.ImportAlias]
    ours: list[str]


def import_in(statement: cst.CSTNode) -> cst.Import | cst.ImportFrom | None:
    """The import that a line is.

    Args:
        statement: Any.

    Returns:
        None for every other statement, and for lines of several.
    """
    if isinstance(statement, cst.SimpleStatementLine) and len(statement.body) == 1:
        found = statement.body[0]
        if isinstance(found, (cst.Import, cst.ImportFrom)):
            return found
    return None


def module_of(found: cst.ImportFrom) -> str:
    """The module that names are imported from.

    Args:
        found: The import.

    Returns:
        Its dotted name; nothing for a relative one.
    """
    name = get_full_name_for_node(found.module) if found.module else None
    return "" if found.relative or name is None else name


def split(found: cst.Import | cst.ImportFrom, is_unused: Callable[[str], bool]) -> Split:
    """Says of each name of an import whether it stays, is one of ours, or goes.

    Args:
        found: The import.
        is_unused: Whether the port takes the last use of a name.

    Returns:
        Those that stay, and those of ours.
    """
    if isinstance(found.names, cst.ImportStar):
        return Split([], [])
    kept, ours = [], []
    prefix = f"{module_of(found)}." if isinstance(found, cst.ImportFrom) else ""
    for alias in found.names:
        name = prefix + (get_full_name_for_node(alias.name) or "")
        bound = alias.evaluated_alias or alias.evaluated_name.split(".")[0]
        # `import a.b` may be there for its own sake.
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
    """An import of fewer names, in the layout that it has.

    Args:
        line: The line of the import.
        names: Those of its names that stay.

    Returns:
        The line, gone where no name stays.
    """
    found = import_in(line)
    assert found is not None
    if not names:
        return line.with_changes(body=[GONE])
    assert not isinstance(found.names, cst.ImportStar)
    last = names[-1].with_changes(comma=_end(names[-1], found.names[-1]))
    return line.with_changes(body=[found.with_changes(names=[*names[:-1], last])])


def _end(name: cst.ImportAlias, last: cst.ImportAlias) -> cst.Comma | cst.MaybeSentinel:
    """What follows a name that becomes the last one: its comment, and the end of the line."""
    mine, end = _space_after(name), _space_after(last)
    if mine is None or mine.first_line.comment is None:
        return last.comma
    changes = {} if end is None else {"indent": end.indent, "last_line": end.last_line}
    return cst.Comma(whitespace_after=mine.with_changes(**changes))


def _space_after(name: cst.ImportAlias) -> cst.ParenthesizedWhitespace | None:
    """The end of the line after a name and its comma."""
    space = name.comma.whitespace_after if isinstance(name.comma, cst.Comma) else None
    return space if isinstance(space, cst.ParenthesizedWhitespace) else None


def from_ours(
    names: Collection[str], leading_lines: Sequence[cst.EmptyLine] = ()
) -> cst.SimpleStatementLine:
    """Imports names from ours.

    Args:
        names: As ``Brain`` or ``Brain as B``.
        leading_lines: What stands above it.

    Returns:
        The line.
    """
    text = f"from {OURS} import {', '.join(sorted(names))}"
    line = cst.ensure_type(cst.parse_statement(text), cst.SimpleStatementLine)
    return line.with_changes(leading_lines=leading_lines)


def extended(line: cst.SimpleStatementLine, names: Collection[str]) -> cst.SimpleStatementLine:
    """An import from ours, with more names; its layout stays.

    Args:
        line: The line of the import.
        names: Names to add, where they are not there.

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
    """Where one more import goes: after the imports among which SpeechBrain's are.

    Args:
        body: The statements of a file.

    Returns:
        The place before which to insert it.
    """
    places = [n for n, statement in enumerate(body) if _names(statement)]
    first = next((n for n in places if is_speechbrains(body[n])), None)
    if first is None:
        # A file that imports nothing at its top may begin with a docstring.
        has_docstring = bool(body) and matchers.matches(body[0], DOCSTRING)
        first = next(iter(places), 0 if has_docstring else -1)
    end = first + 1
    while end in places:
        end += 1
    return end


def is_speechbrains(statement: cst.CSTNode) -> bool:
    """Whether a line imports SpeechBrain, or something of it.

    Args:
        statement: Any.
    """
    return any(name.split(".")[0] == "speechbrain" for name in _names(statement))


def _names(statement: cst.CSTNode) -> list[str]:
    """The modules that a line imports, or imports from; a dot for a relative import."""
    parts = statement.body if isinstance(statement, cst.SimpleStatementLine) else ()
    names: list[str] = []
    for part in parts:
        if isinstance(part, cst.ImportFrom):
            names.append(module_of(part) or ".")
        elif isinstance(part, cst.Import):
            names += [alias.evaluated_name for alias in part.names]
    return names
