"""The keys of a hyperparameters file by which a value that is in use can be overridden."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import yaml
from hyperpyyaml import resolve_references

from .overrides import entries

# The keys that lead to a value.
Keys = tuple[str, ...]


def keys_of(
    hparams_file: str,
    overrides: str,
    values: Collection[float],
    is_named: Callable[[str], bool],
    is_likely: Callable[[Keys, str], bool],
) -> list[str]:
    """Finds the keys that have a value, by their names.

    A reference to another key, ``lr: !ref <lr_adam>``, leads to that one.

    Args:
        hparams_file: The file.
        overrides: YAML text, as for ``load_hyperpyyaml``.
        values: What is looked for.
        is_named: Whether a key may have it, by its name.
        is_likely: Of several, whether this is one, by its keys and the tag of its section;
            where none is, all are.

    Returns:
        Names as ``--name=value`` takes them, ``lr_adam`` or ``opt_class.lr``, each once.
    """
    with open(hparams_file, encoding="utf-8") as stream:
        resolved = _leaves(_compose(resolve_references(stream, overrides).getvalue()))
    found = {keys: _number(node) for keys, node, _ in resolved}
    leaves = list(_leaves(_compose(Path(hparams_file).read_text(encoding="utf-8"))))
    nodes = {keys: node for keys, node, _ in leaves}
    named = [
        (keys, is_likely(keys, tag))
        for keys, _, tag in leaves
        if is_named(keys[-1]) and found.get(keys) in values
    ]
    any_is_likely = any(likely for _, likely in named)
    chosen = [keys for keys, likely in named if likely or not any_is_likely]
    return list(dict.fromkeys(".".join(_origin(keys, nodes)) for keys in chosen))


def _compose(text: str) -> yaml.Node | None:
    # Composed alone: nothing that a tag names is made.
    return yaml.compose(text, yaml.SafeLoader)


def _leaves(
    node: yaml.Node | None, keys: Keys = ()
) -> Iterator[tuple[Keys, yaml.ScalarNode, str]]:
    """The scalars that an override reaches, each with the tag of the section that it is in."""
    for key, value in entries(node).items():
        if isinstance(value, yaml.ScalarNode):
            yield (*keys, key), value, "" if node is None else node.tag
        else:
            yield from _leaves(value, (*keys, key))


def _origin(keys: Keys, nodes: dict[Keys, yaml.ScalarNode]) -> Keys:
    node = nodes[keys]
    reference = re.fullmatch(r"<(\w+)>", node.value) if node.tag == "!ref" else None
    if reference is None or (reference[1],) not in nodes:
        return keys
    return _origin((reference[1],), nodes)


def _number(node: yaml.ScalarNode) -> float | None:
    try:
        return float(node.value)
    except ValueError:
        return None
