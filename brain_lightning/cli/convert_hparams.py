"""Extracts the part of a recipe's hyperparameters that inference needs."""

from __future__ import annotations

import pydoc
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hyperpyyaml import resolve_references
from hyperpyyaml.core import deref
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from torch.nn import Module

from brain_lightning.errors import RecipeError

PRETRAINER = "!new:speechbrain.utils.parameter_transfer.Pretrainer\nloadables: {}\n"
REFERENCES = ("!ref", "!copy")
UNREADABLE = (YAMLError, OSError, ValueError, KeyError, RecursionError)


class Hyperparameters:
    """A HyperPyYAML file as a tree, in which an alias is the node that it refers to.

    Args:
        path: Path of the file. No object that it names is created.

    Raises:
        RecipeError: The file cannot be read, or has no ``modules``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._tree = _yaml().load(path.read_text(encoding="utf-8"))
        except UNREADABLE as error:
            raise RecipeError(f"{path} cannot be read: {error}") from error
        if not isinstance(self._tree, Mapping) or "modules" not in self._tree:
            raise RecipeError(f"{path} has no `modules`, which from_hparams needs")

    def is_module(self, name: str) -> bool:
        """Returns whether a recoverable is an entry of ``modules`` or a ``torch.nn.Module``.

        Args:
            name: Name of the recoverable.
        """
        node = self._target(self._recoverable(name))
        members = _mapping(self._target(self._tree["modules"])).values()
        return node is not None and (
            any(self._target(member) is node for member in members) or _is_torch_module(node)
        )

    def pretrained(self) -> set[str]:
        """Returns the names that the recipe's pretrainer loads."""
        return set(self._entries("pretrainer", "loadables"))

    def write(self, names: Iterable[str], path: Path) -> None:
        """Writes the part that inference needs, with a pretrainer that loads the weights.

        Leaves out data, optimizers, loggers and the like, and all entries to which only
        these refer.

        Args:
            names: The recoverables to load.
            path: File to write for ``from_hparams``.

        Raises:
            RecipeError: A recoverable has no entry, or the written file cannot be loaded.
        """
        loadables = {name: self._recoverable(name) for name in names}
        for name, node in loadables.items():
            if node is None:
                raise RecipeError(
                    f"{self._path} does not define {name!r}. Add it to the recoverables of "
                    "`checkpointer`, or add an entry of that name."
                )
        needed = self._needed([self._tree["modules"], loadables]) | {"modules"}
        kept = self._tree.copy()
        # The pretrainer goes last. The recipe's pretrainer may come before the modules.
        for name in self._tree:
            if name not in needed or name == "pretrainer":
                del kept[name]
        kept["pretrainer"] = _yaml().load(PRETRAINER)
        kept["pretrainer"]["loadables"] = loadables
        with path.open("w", encoding="utf-8") as file:
            _yaml().dump(kept, file)
        self._check(path)

    def _check(self, path: Path) -> None:
        """Reads a file as ``load_hyperpyyaml`` does, without creating objects."""
        try:
            with path.open(encoding="utf-8") as file:
                resolved = _yaml().load(resolve_references(file))
            for node in _walk(resolved):
                # A reference is left if it refers to a later reference, or to itself.
                if _tag(node) in REFERENCES:
                    raise ValueError(f"{_tag(node)} {node.value} cannot be resolved")
        except UNREADABLE as error:
            raise RecipeError(
                f"the part of {self._path} that inference needs could not be loaded: {error}. "
                "Use a complete file with --hparams=FILE, for example the hyperparams.yaml "
                "that SpeechBrain writes into the output_folder."
            ) from error

    def _recoverable(self, name: str) -> Any:
        """Returns a recoverable of the checkpointer, or else the entry of that name."""
        node = self._entries("checkpointer", "recoverables").get(name)
        return self._tree.get(name) if node is None else node

    def _entries(self, owner: str, argument: str) -> Mapping[str, Any]:
        found = _mapping(self._target(self._tree.get(owner))).get(argument)
        return _mapping(self._target(found))

    def _target(self, node: Any) -> Any:
        """Follows references to their node. Returns a reference that cannot be resolved."""
        seen: list[str] = []
        while (reference := _reference(node)) and reference not in seen:
            seen.append(reference)
            try:
                node = deref(reference.strip("<>"), self._tree)
            except ValueError:
                return node
        return node

    def _needed(self, nodes: list[Any]) -> set[str]:
        """Returns the entries that nodes need, directly or through other entries."""
        # An alias is the same object. Plain values have no anchor, and may be cached objects.
        shared = {id(n): name for name, n in self._tree.items() if hasattr(n, "anchor")}
        found: set[str] = set()
        while nodes:
            used: set[str] = set()
            for node in (inner for outer in nodes for inner in _walk(outer)):
                used |= _references(node)
                used |= {shared[id(node)]} if id(node) in shared else set()
            new = (used & self._tree.keys()) - found
            found |= new
            nodes = [self._tree[name] for name in new]
        return found


def _yaml() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = sys.maxsize
    return yaml


def _mapping(node: Any) -> Mapping[str, Any]:
    return node if isinstance(node, Mapping) else {}


def _walk(node: Any) -> Iterator[Any]:
    yield node
    inner: Iterable[Any] = node if isinstance(node, list) else _mapping(node).values()
    for each in inner:
        yield from _walk(each)


def _tag(node: Any) -> str:
    return getattr(getattr(node, "tag", None), "value", None) or ""


def _reference(node: Any) -> str | None:
    """Returns the reference in a node that consists of one reference only, or None."""
    whole = _tag(node) == "!ref" and re.fullmatch(r"<[^<>]+>", node.value)
    return whole[0] if whole else None


def _references(node: Any) -> set[str]:
    """Returns the top-level entries that a node refers to, such as ``a`` for ``<a[b]>``."""
    if _tag(node) not in REFERENCES:
        return set()
    return set(re.findall(r"<([^<>\[.]+)", node.value))


def _is_torch_module(node: Any) -> bool:
    """Returns whether a node creates a torch module. False if the class cannot be imported."""
    if not _tag(node).startswith("!new:"):
        return False
    try:
        found = pydoc.locate(_tag(node).removeprefix("!new:"))
    except pydoc.ErrorDuringImport:
        return False
    return isinstance(found, type) and issubclass(found, Module)
