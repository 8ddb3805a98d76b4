"""Converts overrides (``--name=value``) of a YAML file to text for ``load_hyperpyyaml``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from brain_lightning.errors import RunOptionError

from .run_options import check_names

# Values as strings. A section is a nested mapping.
Tree = dict[str, Any]


def overrides_to_yaml(words: Sequence[str], hparams_file: str) -> str:
    """Converts ``--a=b`` and ``--a b`` to ``a: b`` (``RunOptions._convert_to_yaml``).

    ``--section.key=value`` sets one key of a section and leaves its other keys unchanged.

    Args:
        words: Words of the command line.
        hparams_file: Path of the YAML file.

    Returns:
        YAML text. Values are copied unchanged.

    Raises:
        RunOptionError: A word does not belong to an override, or the file does not have the
            section or the key.
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
            raise RunOptionError(
                f"{word!r} does not belong to an option. Write overrides as --name=value."
            )
    return named


def _document(hparams_file: str) -> Any:
    # Unknown tags raise no error, because yaml.compose creates no objects.
    return yaml.compose(Path(hparams_file).read_text(encoding="utf-8"), yaml.SafeLoader)


def _path(name: str, document: Any, hparams_file: str) -> list[str]:
    """Splits the name of an override into its sections and its key."""
    if name in entries(document):
        return [name]
    path, node = name.split("."), document
    for depth, key in enumerate(path):
        section = ".".join(path[:depth])
        if not isinstance(node, yaml.MappingNode):
            raise RunOptionError(
                f"--{name}: {section!r} of {hparams_file} is not a section with keys. Set its "
                f"value with --{section}=..."
            )
        known = entries(node)
        check_names(f"key of {section or hparams_file}, in --{name}:", [key], list(known))
        node = known[key]
    return path


def entries(node: Any) -> dict[str, Any]:
    """Returns the nodes of a section by key. A node that is not a section has no keys.

    Args:
        node: Node that ``yaml.compose`` returned.
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
    return RunOptionError(
        f"--{name}: a section and a key in it are both set. Set the section as a whole or "
        "key by key."
    )


def _lines(tree: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{name}: {value}".rstrip()
