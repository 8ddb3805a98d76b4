"""Reads the source of a HyperPyYAML file: entries of ``modules``, and the classes it names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from brain_lightning.errors import RecipeError

# Tags that are followed by the name of a class or a function.
NAMES = re.compile(r"!(?:name|new|apply|applyref):(.+)")
REFERENCE = re.compile(r"<([^<>.\[]+)[^<>]*>")
# Tags of objects that can be called. A list or a number cannot be called.
OBJECT = re.compile(r"!(new|apply|ref|applyref)\b")
OPTIMIZER = re.compile(r"!new:torch\.optim\.(?!lr_scheduler)")
LIST = re.compile(r"!new:torch\.nn\.Module(List|Dict)$")


class HparamsSource:
    """The source of a hyperparameters file. No object in it is created.

    Args:
        path: Path of the file.

    Attributes:
        path: Path of the file.
        named: Dotted names of classes and functions, with their lines.
        modules: The entries of ``modules``, or None if there is no such section.
        parts: Names of the objects that the entries consist of, with the entry of each.
        inner: Names in ``parts`` that are called only within an entry: they are neither an
            entry nor in a list that is an entry.
        optimizers: Names of the optimizers that the file creates, with their lines.

    Raises:
        RecipeError: The file cannot be read, or is not valid YAML.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        values = _mapping(_compose(self.path))
        for included in [n for n in values.values() if n.tag.startswith("!include:")]:
            file = self.path.parent / included.tag.removeprefix("!include:")
            values = {**(_mapping(_compose(file)) if file.is_file() else {}), **values}
        self._values = values
        nodes = [node for value in values.values() for node in _walk(value)]
        tagged = ((NAMES.match(node.tag), node.start_mark.line + 1) for node in nodes)
        self.named = {found[1]: line for found, line in tagged if found}
        modules = values.get("modules")
        self.modules = set(_mapping(modules)) if modules is not None else None
        self.parts: dict[str, str] = {}
        self.parts.update({entry: entry for entry in _mapping(modules)})
        for entry, node in _mapping(modules).items():
            self._add_parts(entry, node, set())
        called = {name for node in _mapping(modules).values() for name in self._called(node)}
        self.inner = self.parts.keys() - called - _mapping(modules).keys()
        made = {name: node for name, node in values.items() if OPTIMIZER.match(node.tag)}
        self.optimizers = {name: node.start_mark.line + 1 for name, node in made.items()}

    def _called(self, node: yaml.Node) -> Iterator[str]:
        """Yields the names of an entry, or of the modules in a list that is an entry."""
        names = [name for name, value in self._values.items() if value is node]
        if node.tag == "!ref" and isinstance(node, yaml.ScalarNode):
            names += REFERENCE.findall(node.value)
        yield from names
        for value in [node, *(self._values.get(name, node) for name in names)]:
            if LIST.match(value.tag):
                for part in _walk(value):
                    yield from self._called(part) if part is not value else ()

    def _add_parts(self, entry: str, node: yaml.Node, seen: set[str]) -> None:
        """Adds the parts of an entry, and their parts, through references and aliases."""
        names = {id(value): name for name, value in self._values.items()}
        for part in _walk(node):
            found = [names[id(part)]] if id(part) in names else []
            if part.tag == "!ref" and isinstance(part, yaml.ScalarNode):
                found += REFERENCE.findall(part.value)
            for name in found:
                value = self._values.get(name)
                if name not in seen and value is not None and OBJECT.match(value.tag):
                    seen.add(name)
                    self.parts.setdefault(name, entry)
                    self._add_parts(entry, value, seen)


def _compose(path: Path) -> yaml.Node | None:
    try:
        # Composing the YAML reads tags as strings, and creates no object that they name.
        return yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: {error}") from error


def _mapping(node: yaml.Node | None) -> dict[str, yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        return {}
    return {key.value: value for key, value in node.value if isinstance(key.value, str)}


def _walk(node: yaml.Node) -> Iterator[yaml.Node]:
    yield node
    if isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            yield from _walk(value)
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _walk(value)
