"""Ports a recipe: its script, the files that its Brains come from, its YAML files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import libcst

from brain_lightning.errors import RecipeError

from .by_hand import SKIPPED_HOOKS, WrittenOut
from .equivalents import OURS, Remark
from .local_modules import BYTE_ORDER_MARK, files_of, local_modules, parse, read_script
from .python_file import PortedFile, port_python
from .yaml_file import included_files, named_objects, plain_values, port_yaml, with_step

COMPLETELY, PARTLY, NOT_AT_ALL = "completely", "partly", "not at all"


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
        """How much of the recipe is ported: ``completely``, ``partly`` or ``not at all``."""
        if not self.brains:
            return NOT_AT_ALL
        return PARTLY if self.remarks else COMPLETELY


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
    yaml = {path: read_script(path) for path in _with_included(hparams)}
    values = [plain_values(yaml[path], str(path)) for path in hparams]
    texts = {path: read_script(path) for path in (script, *local_modules(script))}
    ported = _ported(script, texts, values)
    brains = [name for each in ported.values() for name in each.brains]
    remarks = [
        Remark(str(path), line, says)
        for path, each in ported.items()
        for line, says in each.remarks
    ]
    remarks += _brains_in(yaml, script, ported)
    step = ported[script].step
    after = {path: each.text for path, each in ported.items()}
    after |= {path: _port_yaml(path, text, step, hparams) for path, text in yaml.items()}
    if not brains:
        after = {}
        remarks = remarks or [Remark(str(script), 1, "no subclass of Brain: nothing to port")]
    changes = [
        Change(path, text, after.get(path, text)) for path, text in (texts | yaml).items()
    ]
    for change in changes:
        _check_parses(change.path, change.after)
    hooks_apart = SKIPPED_HOOKS if step else frozenset()
    return PortedRecipe(script, list(hparams), changes, brains, remarks, hooks_apart)


def _ported(
    script: Path, texts: Mapping[Path, str], values: Sequence[Mapping[str, str]]
) -> dict[Path, PortedFile]:
    """The script, and files with a Brain or a Stage: ours equals theirs, but is another."""
    names = {_module_name(path, script) for path in texts}
    found = {script: _port(script, texts[script], names, values)}
    for path, text in texts.items():
        # Most of what is beside a script prepares data.
        if path != script and ("Brain" in text or "Stage" in text):
            # A fit_batch there may be that of many Brains.
            found[path] = _port(path, text, names, [])
    return {
        path: each
        for path, each in found.items()
        if path == script or each.brains or each.has_stage or each.remarks
    }


def _brains_in(
    yaml: Mapping[Path, str], script: Path, ported: Mapping[Path, PortedFile]
) -> Iterator[Remark]:
    """Names Brains that YAML files make, and that are in no file that is ported."""
    for path, text in yaml.items():
        for line, name in named_objects(text, str(path)):
            files = list(files_of(script.parent, name.split(".")[:-1] or [name]))
            if not ported.keys() & files and _is_brain(name, files):
                says = (
                    f"{name} is a Brain that no file of the recipe imports, and stays: give "
                    "it brain_lightning.Brain where it is defined"
                )
                yield Remark(str(path), line, says)


def _is_brain(name: str, files: Sequence[Path]) -> bool:
    """Whether a name is a Brain by its file, or, without a file, by what it is called."""
    root, attribute = name.split(".")[0], name.split(".")[-1]
    if files:
        return any(attribute in _port(f, read_script(f), set(), []).brains for f in files)
    return attribute.endswith("Brain") and root != OURS


def _port_yaml(path: Path, text: str, step: WrittenOut | None, hparams: Sequence[Path]) -> str:
    ported = port_yaml(text, str(path))
    if step is None or path not in hparams:
        return ported
    return with_step(ported, step.clip, step.factor)


def _check_parses(path: Path, text: str) -> None:
    """Refuses to hand out what could not be run."""
    if path.suffix == ".py":
        parse(text, path)
    else:
        plain_values(text, str(path))


def _module_name(path: Path, script: Path) -> str:
    """What a script imports a module beside it by, as far as the first dot."""
    is_below = path.is_relative_to(script.parent)
    return path.relative_to(script.parent).parts[0].removesuffix(".py") if is_below else ""


def _port(
    path: Path, text: str, names: set[str], values: Sequence[Mapping[str, str]]
) -> PortedFile:
    parse(text, path)
    try:
        ported = port_python(text.removeprefix(BYTE_ORDER_MARK), names, values)
    except libcst.ParserSyntaxError as error:
        raise RecipeError(f"{path}, line {error.raw_line}: {error.message}") from error
    mark = BYTE_ORDER_MARK if text.startswith(BYTE_ORDER_MARK) else ""
    return PortedFile(mark + ported.text, *ported[1:])


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
