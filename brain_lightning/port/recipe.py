"""Ports a recipe: its script, the files that its Brains come from, its YAML files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import libcst

from brain_lightning.errors import RecipeError

from .by_hand import AROUND
from .equivalents import Remark
from .local_modules import local_modules, parse, read_script
from .python_file import PortedFile, port_python
from .yaml_file import included_files, plain_values, port_yaml, with_step

WHOLE, IN_PART, NOT_AT_ALL = "whole", "in part", "not at all"


@dataclass(frozen=True)
class Change:
    """One file of a recipe.

    Attributes:
        path: Where it is.
        before: Its text.
        after: Its text, ported; the same where nothing of it is to be ported.
    """

    path: Path
    before: str
    after: str


@dataclass(frozen=True)
class PortedRecipe:
    """A recipe that was ported.

    Attributes:
        script: Its script.
        hparams: The YAML files that were given.
        changes: All of its files: those that change, and those that the script needs beside
            it.
        brains: Its Brains.
        remarks: What stays as it is, and why.
        hooks_apart: Hooks that are called in the port alone, where a ``fit_batch`` was taken
            out that is SpeechBrain's own but for them.
    """

    script: Path
    hparams: list[Path]
    changes: list[Change]
    brains: list[str]
    remarks: list[Remark]
    hooks_apart: frozenset[str]

    @property
    def outcome(self) -> str:
        """How much of it is ported: ``whole``, ``in part`` or ``not at all``."""
        if not self.brains:
            return NOT_AT_ALL
        return IN_PART if self.remarks else WHOLE


def port_recipe(script: Path, hparams: Sequence[Path] = ()) -> PortedRecipe:
    """Ports a recipe; nothing is written.

    Args:
        script: Its script.
        hparams: Its HyperPyYAML files, those that they include among them.

    Returns:
        Its files as they were and as they become.

    Raises:
        RecipeError: A file cannot be read, or is no Python or no YAML.
    """
    modules = local_modules(script)
    names = {_module_name(path, script) for path in modules}
    yaml = {path: read_script(path) for path in _with_included(hparams)}
    values = [plain_values(yaml[path], str(path)) for path in hparams]
    texts = {path: read_script(path) for path in (script, *modules)}
    found = {path: _port(path, text, names, values) for path, text in texts.items()}
    brains = [name for ported in found.values() for name in ported.brains]
    changes = [
        Change(path, text, found[path].text if _is_ported(path, script, found) else text)
        for path, text in texts.items()
    ]
    remarks = [
        Remark(str(path), line, says)
        for path, ported in found.items()
        if _is_ported(path, script, found)
        for line, says in ported.remarks
    ]
    steps = [ported.step for ported in found.values() if ported.step is not None]
    for path, text in yaml.items():
        ported_text = port_yaml(text, str(path))
        for step in steps if path in hparams else ():
            ported_text = with_step(ported_text, step.clip, step.factor)
        changes.append(Change(path, text, ported_text))
    if not brains:
        changes = [Change(each.path, each.before, each.before) for each in changes]
        remarks = remarks or [Remark(str(script), 1, "no subclass of Brain: nothing to port")]
    for change in changes:
        check_parses(change.path, change.after)
    hooks_apart = AROUND if steps else frozenset()
    return PortedRecipe(script, list(hparams), changes, brains, remarks, hooks_apart)


def check_parses(path: Path, text: str) -> None:
    """Refuses a file that is no Python, or no YAML.

    Args:
        path: The file.
        text: Its text.

    Raises:
        RecipeError: It does not parse.
    """
    if path.suffix == ".py":
        parse(text, path)
    else:
        plain_values(text, str(path))


def _module_name(path: Path, script: Path) -> str:
    """What a script imports a module beside it by, as far as the first dot."""
    is_below = path.is_relative_to(script.parent)
    return path.relative_to(script.parent).parts[0].removesuffix(".py") if is_below else ""


def _is_ported(path: Path, script: Path, found: dict[Path, PortedFile]) -> bool:
    """Whether a file is: what has no Brain may name SpeechBrain's Stage, which equals ours."""
    return path == script or bool(found[path].brains)


def _port(
    path: Path, text: str, names: set[str], values: Sequence[Mapping[str, str]]
) -> PortedFile:
    parse(text, path)
    try:
        return port_python(text, names, values)
    except libcst.ParserSyntaxError as error:
        raise RecipeError(f"{path}, line {error.raw_line}: {error.message}") from error


def _with_included(paths: Sequence[Path]) -> Iterator[Path]:
    """YAML files, and those that they include by a path of their own."""
    seen: set[Path] = set()
    waiting = list(paths)
    while waiting:
        path = waiting.pop(0)
        if path.resolve() in seen:
            continue
        seen.add(path.resolve())
        yield path
        for name in included_files(read_script(path), str(path)):
            waiting += [path.parent / name] if (path.parent / name).is_file() else []
