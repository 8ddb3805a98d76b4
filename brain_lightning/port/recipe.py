"""Ports a recipe: its script, the modules with its Brains, and its YAML files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import libcst

from brain_lightning.errors import RecipeError

from .by_hand import SKIPPED_HOOKS, ReplaceableStep
from .equivalents import OURS, Remark
from .local_modules import BYTE_ORDER_MARK, files_of, local_modules, parse, read_script
from .python_file import PortedFile, port_python
from .yaml_file import included_files, named_objects, plain_values, port_yaml, with_step

COMPLETELY, PARTLY, NOT_AT_ALL = "completely", "partly", "not at all"


@dataclass(frozen=True)
class Change:
    """One file of a recipe.

    Attributes:
        path: Path of the file.
        before: Original text.
        after: Ported text, which is the original text if there is nothing to port.
    """

    path: Path
    before: str
    after: str


@dataclass(frozen=True)
class PortedRecipe:
    """A ported recipe.

    Attributes:
        script: Path of the script.
        hparams: Paths of the given YAML files.
        changes: All files of the recipe, including those that do not change.
        brains: Names of its Brains.
        remarks: Code that is left unchanged, with the reasons.
        port_only_hooks: Hooks that only the port calls, if a ``fit_batch`` was removed that does
            not call them.
    """

    script: Path
    hparams: list[Path]
    changes: list[Change]
    brains: list[str]
    remarks: list[Remark]
    port_only_hooks: frozenset[str]

    @property
    def outcome(self) -> str:
        """How much of the recipe is ported: ``completely``, ``partly`` or ``not at all``."""
        if not self.brains:
            return NOT_AT_ALL
        return PARTLY if self.remarks else COMPLETELY


def port_recipe(script: Path, hparams: Sequence[Path] = ()) -> PortedRecipe:
    """Ports a recipe without writing files.

    Args:
        script: Path of the script.
        hparams: Paths of its HyperPyYAML files. Files that these include are ported too.

    Returns:
        The ported recipe.

    Raises:
        RecipeError: A file cannot be read, or is not valid Python or YAML.
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
        says = "There is no subclass of Brain, so there is nothing to port."
        remarks = remarks or [Remark(str(script), 1, says)]
    changes = [
        Change(path, text, after.get(path, text)) for path, text in (texts | yaml).items()
    ]
    for change in changes:
        _check_parses(change.path, change.after)
    port_only_hooks = SKIPPED_HOOKS if step else frozenset()
    return PortedRecipe(script, list(hparams), changes, brains, remarks, port_only_hooks)


def _ported(
    script: Path, texts: Mapping[Path, str], values: Sequence[Mapping[str, str]]
) -> dict[Path, PortedFile]:
    """Ports the script and the modules that use a Brain, a Stage, or need a remark."""
    names = {_module_name(path, script) for path in texts}
    found = {script: _port(script, texts[script], names, values)}
    for path, text in texts.items():
        # Skips other modules, most of which prepare data.
        if path != script and ("Brain" in text or "Stage" in text):
            # No hparams: a fit_batch of such a module may belong to several recipes.
            found[path] = _port(path, text, names, [])
    return {
        path: each
        for path, each in found.items()
        if path == script or each.brains or each.has_stage or each.remarks
    }


def _brains_in(
    yaml: Mapping[Path, str], script: Path, ported: Mapping[Path, PortedFile]
) -> Iterator[Remark]:
    """Yields remarks on Brains that YAML files create, and that are in no ported file."""
    for path, text in yaml.items():
        for line, name in named_objects(text, str(path)):
            files = list(files_of(script.parent, name.split(".")[:-1] or [name]))
            if not ported.keys() & files and _is_brain(name, files):
                says = (
                    f"The Brain {name} is left unchanged, because no file of the recipe "
                    "imports it. Change its base to brain_lightning.Brain where it is defined."
                )
                yield Remark(str(path), line, says)


def _is_brain(name: str, files: Sequence[Path]) -> bool:
    """Returns whether its file defines a Brain of that name, or, without a file, its name."""
    root, attribute = name.split(".")[0], name.split(".")[-1]
    if files:
        return any(attribute in _port(f, read_script(f), set(), []).brains for f in files)
    return attribute.endswith("Brain") and root != OURS


def _port_yaml(
    path: Path, text: str, step: ReplaceableStep | None, hparams: Sequence[Path]
) -> str:
    ported = port_yaml(text, str(path))
    if step is None or path not in hparams:
        return ported
    return with_step(ported, step.clip, step.factor)


def _check_parses(path: Path, text: str) -> None:
    """Raises an error if a ported file is not valid Python or YAML."""
    if path.suffix == ".py":
        parse(text, path)
    else:
        plain_values(text, str(path))


def _module_name(path: Path, script: Path) -> str:
    """Returns the top-level name by which a script imports a module of its folder."""
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
    """Yields YAML files, and the files that they include."""
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
