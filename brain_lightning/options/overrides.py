"""Overrides of a YAML file, ``--name=value``, as the text that ``load_hyperpyyaml`` takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from brain_lightning.errors import RunOptionError

from .run_options import check_names

# A value as it was given, or a section: its values by name.
Tree = dict[str, Any]


def overrides_to_yaml(words: Sequence[str], hparams_file: str) -> str:
    """``--a=b`` and ``--a b`` become ``a: b`` (``RunOptions._convert_to_yaml``).

    ``--section.key=value`` sets one key of a section, and leaves the others.

    Args:
        words: Of the command line.
        hparams_file: The YAML file.

    Returns:
        YAML text, with the values as they were given.

    Raises:
        RunOptionError: A word belongs to no override, or the file has no such key in such a
            section.
    """
    overrides: list[tuple[list[str], str]] = []
    document = None
    for name, value in _named(words):
        path = [name]
        if "." in name:
            document = document or _document(hparams_file)
            path = _path(name, document, hparams_file)
        overrides.append((path, value))
    return "\n".join(_lines(_tree(overrides)))


def _named(words: Sequence[str]) -> list[tuple[str, str]]:
    named: list[tuple[str, str]] = []
    for word in words:
        if word.startswith("--"):
            name, _, value = word.removeprefix("--").partition("=")
            named.append((name, value))
        elif named:
            name, value = named[-1]
            named[-1] = (name, f"{value} {word}".strip())
        else:
            raise RunOptionError(f"{word!r} belongs to no option: overrides are --name=value")
    return named


def _document(hparams_file: str) -> Any:
    # Its tags need not be known: nothing is made of them.
    return yaml.compose(Path(hparams_file).read_text(encoding="utf-8"), yaml.SafeLoader)


def _path(name: str, document: Any, hparams_file: str) -> list[str]:
    """The sections of an override, and its key."""
    if name in entries(document):
        return [name]
    path, node = name.split("."), document
    for depth, key in enumerate(path):
        section = ".".join(path[:depth])
        if not isinstance(node, yaml.MappingNode):
            raise RunOptionError(
                f"--{name}: {section!r} is no section of {hparams_file}, which has keys; set "
                f"the whole with --{section}=..."
            )
        known = entries(node)
        check_names(f"key of {section or hparams_file}, in --{name}:", [key], list(known))
        node = known[key]
    return path


def entries(node: Any) -> dict[str, Any]:
    """The nodes of a section by their keys; what is no section has none.

    Args:
        node: What PyYAML has composed.
    """
    found: dict[str, Any] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.tag == "tag:yaml.org,2002:merge":
            merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for each in merged:
                found = entries(each) | found
        else:
            found[key.value] = value
    return found


def _tree(overrides: Sequence[tuple[Sequence[str], str]]) -> Tree:
    tree: Tree = {}
    for (*sections, key), value in overrides:
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise _given_twice(sections, key)
        if isinstance(node.get(key), dict):
            raise _given_twice(sections, key)
        node[key] = value
    return tree


def _given_twice(sections: Sequence[str], key: str) -> RunOptionError:
    name = ".".join([*sections, key])
    return RunOptionError(f"--{name}: a section is set as a whole, or key by key, not both")


def _lines(tree: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{name}: {value}".rstrip()
