"""Finds the keys of a hyperparameters file that set a given value, for use in an override."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import yaml
from hyperpyyaml import resolve_references

from .overrides import entries

# The keys that lead to a value, from the outermost section to the key itself.
Keys = tuple[str, ...]


def keys_of(
    hparams_file: str,
    overrides: str,
    values: Collection[float],
    is_named: Callable[[str], bool],
    is_likely: Callable[[Keys, str], bool],
) -> list[str]:
    """Returns the keys that set one of some values.

    A reference to another key, such as ``lr: !ref <lr_adam>``, is followed to that key.

    Args:
        hparams_file: Path of the hyperparameters file.
        overrides: YAML text, as for ``load_hyperpyyaml``.
        values: Values to look for.
        is_named: Returns whether a key of this name may set the value.
        is_likely: If several keys are found, returns whether a key is a likely one, from its
            path and the tag of its section. If no key is likely, all keys are returned.

    Returns:
        Names for ``--name=value``, such as ``lr_adam`` or ``opt_class.lr``. No duplicates.
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
    # yaml.compose creates nodes only. The objects that tags name are not created.
    return yaml.compose(text, yaml.SafeLoader)


def _leaves(
    node: yaml.Node | None, keys: Keys = ()
) -> Iterator[tuple[Keys, yaml.ScalarNode, str]]:
    """Yields the scalars that an override can set, each with the tag of its section."""
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
