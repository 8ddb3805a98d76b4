"""The part of a recipe's hyperparameters that inference needs."""

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
    """A recipe's HyperPyYAML, as a tree in which an alias is the node that it refers to.

    Args:
        path: The file; nothing that it names is made.

    Raises:
        RecipeError: It cannot be read, or has no ``modules``.
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
        """Whether a recoverable is one of ``modules``, or of a class of torch's modules.

        Args:
            name: Its name.
        """
        node = self._target(self._recoverable(name))
        members = _mapping(self._target(self._tree["modules"])).values()
        return node is not None and (
            any(self._target(member) is node for member in members) or _is_torch_module(node)
        )

    def pretrained(self) -> set[str]:
        """What the recipe's own pretrainer loads."""
        return set(self._entries("pretrainer", "loadables"))

    def write(self, names: Iterable[str], path: Path) -> None:
        """Writes the part that inference needs, and what loads it.

        Data, optimizers, loggers and the like are left out with everything that only
        they refer to.

        Args:
            names: The recoverables to load.
            path: The file for ``from_hparams``.

        Raises:
            RecipeError: A recoverable is not named, or what is written cannot be loaded.
        """
        loadables = {name: self._recoverable(name) for name in names}
        for name, node in loadables.items():
            if node is None:
                raise RecipeError(
                    f"{self._path} does not say what {name!r} is: name it in `checkpointer`, "
                    "recoverables, or have an entry of that name"
                )
        needed = self._needed([self._tree["modules"], loadables]) | {"modules"}
        kept = self._tree.copy()
        # Ours comes last: the recipe's own pretrainer may come before the modules.
        for name in self._tree:
            if name not in needed or name == "pretrainer":
                del kept[name]
        kept["pretrainer"] = _yaml().load(PRETRAINER)
        kept["pretrainer"]["loadables"] = loadables
        with path.open("w", encoding="utf-8") as file:
            _yaml().dump(kept, file)
        self._check(path)

    def _check(self, path: Path) -> None:
        """As ``load_hyperpyyaml`` reads it, but for making the objects."""
        try:
            with path.open(encoding="utf-8") as file:
                resolved = _yaml().load(resolve_references(file))
            for node in _walk(resolved):
                # One is left where it refers to a reference that comes later, or to itself.
                if _tag(node) in REFERENCES:
                    raise ValueError(f"{_tag(node)} {node.value} leads nowhere")
        except UNREADABLE as error:
            raise RecipeError(
                f"what inference needs of {self._path} could not be loaded: {error}; give a "
                "file that stands for itself with --hparams=FILE, such as the "
                "hyperparams.yaml that SpeechBrain writes into the output_folder"
            ) from error

    def _recoverable(self, name: str) -> Any:
        """A recoverable of the checkpointer, else the entry of its name."""
        node = self._entries("checkpointer", "recoverables").get(name)
        return self._tree.get(name) if node is None else node

    def _entries(self, owner: str, argument: str) -> Mapping[str, Any]:
        found = _mapping(self._target(self._tree.get(owner))).get(argument)
        return _mapping(self._target(found))

    def _target(self, node: Any) -> Any:
        """The node that a reference ends at; one that goes nowhere is its own end."""
        seen: list[str] = []
        while (reference := _reference(node)) and reference not in seen:
            seen.append(reference)
            try:
                node = deref(reference.strip("<>"), self._tree)
            except ValueError:
                return node
        return node

    def _needed(self, nodes: list[Any]) -> set[str]:
        """The entries that nodes refer to, share a node with, or need through others."""
        # An alias is the same object; plain values have no anchor, and may be cached ones.
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
    """The text of a node that is nothing but a reference to another one."""
    whole = _tag(node) == "!ref" and re.fullmatch(r"<[^<>]+>", node.value)
    return whole[0] if whole else None


def _references(node: Any) -> set[str]:
    """The top-level entries that a node refers to, ``a`` of ``<a[b]>``."""
    if _tag(node) not in REFERENCES:
        return set()
    return set(re.findall(r"<([^<>\[.]+)", node.value))


def _is_torch_module(node: Any) -> bool:
    """Whether a node makes one; a class that cannot be imported from here is none."""
    if not _tag(node).startswith("!new:"):
        return False
    try:
        found = pydoc.locate(_tag(node).removeprefix("!new:"))
    except pydoc.ErrorDuringImport:
        return False
    return isinstance(found, type) and issubclass(found, Module)
