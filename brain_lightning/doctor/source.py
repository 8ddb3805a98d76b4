"""A recipe's Brains as they are written in its source, which is not run."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .hparams import HparamsSource
from .meaning import ITSELF, MODULES, Kept
from .method import EntryUse, Handover, HparamsCall, Location, Locations, Method
from .modules import (
    WITHOUT_BRAINS,
    ClassSource,
    Function,
    FunctionSource,
    Modules,
    ModuleSource,
    Reference,
    dotted_name,
)
from .reading import read_function, read_method

# Where a batch is learned from, as far as a Brain's methods are concerned.
LEARNING = ("fit_batch", "compute_forward", "compute_objectives", "on_fit_batch_start",
            "_fit_train", "fit")  # fmt: skip
# Hooks that learn from no batch by themselves.
OTHER_HOOKS = ("__init__", "on_stage_start", "on_stage_end", "on_fit_start", "init_optimizers",
               "on_evaluate_start", "evaluate_batch", "evaluate", "_fit_valid", "zero_grad",
               "make_dataloader", "on_fit_batch_end", "freeze_optimizers")  # fmt: skip


@dataclass
class BrainSource:
    """A subclass of Brain as it is written.

    Attributes:
        name: Its name.
        location: Where it begins.
        base: What it is a Brain of.
        chains: Its methods by name: its own, and those of its bases that it reaches by
            ``super()``, in this order.
        reaches: Names of methods by which ``super()`` reaches those of Brain itself.
    """

    name: str
    location: Location
    base: str
    chains: dict[str, list[Method]] = field(default_factory=dict)
    reaches: set[str] = field(default_factory=set)

    @property
    def methods(self) -> dict[str, Location]:
        """Its methods, and those of its bases within the recipe, and where they are."""
        return {name: chain[0].at for name, chain in self.chains.items()}

    @property
    def reads(self) -> Locations:
        """Attributes of ``self`` that its methods use, and where."""
        return _merged(method.reads for method in self.every())

    @property
    def calls(self) -> Locations:
        """Methods called on anything, and where: ``backward``, ``step`` and others."""
        return _merged(method.calls for method in self.every())

    @property
    def supers(self) -> Locations:
        """Methods called on ``super()``, and where."""
        return _merged(method.supers for method in self.every())

    @property
    def unwraps(self) -> list[Location]:
        """Where ``.module`` of something else than ``self`` is read."""
        return [at for method in self.every() for at in method.unwraps]

    @property
    def entries(self) -> set[str]:
        """Entries of ``self.modules`` that it uses."""
        return {entry for method in self.every() for entry in method.entries}

    @property
    def entry_uses(self) -> list[EntryUse]:
        """What it does with entries of ``self.modules`` once they may be wrapped."""
        after = [method for method in self.every() if method.name != "__init__"]
        return [use for method in after for use in method.entry_uses]

    @property
    def learning(self) -> list[Method]:
        """Its methods in which a batch may be learned from."""
        names = self.reached_from(LEARNING)
        # A helper that no hook calls by its name may be called anywhere.
        others = self.chains.keys() - self.reached_from((*LEARNING, *OTHER_HOOKS))
        return list(self.every(names | others))

    @property
    def hparams_calls(self) -> list[HparamsCall]:
        """What it calls in ``self.hparams`` where a batch may be learned from."""
        calls = (call for method in self.learning for call in method.hparams_calls)
        return [call for call in calls if call.learns]

    def every(self, names: Iterable[str] | None = None) -> Iterator[Method]:
        """Its methods that may be called: none that is overridden and out of reach.

        Args:
            names: Of these alone.

        Yields:
            One after the other.
        """
        chosen = self.chains.keys() if names is None else set(names)
        for name, chain in self.chains.items():
            yield from chain if name in chosen else ()

    def reached_from(self, names: Iterable[str]) -> set[str]:
        """Methods of its own that some methods call, and those that these call.

        Args:
            names: Where to begin.

        Returns:
            Their names, with those that it begins with and has.
        """
        found: set[str] = set()
        ahead = set(names) & self.chains.keys()
        while ahead:
            found |= ahead
            read = {name for method in self.every(ahead) for name in method.reads}
            ahead = (read & self.chains.keys()) - found
        return found

    def is_own(self, name: str) -> bool:
        """Whether a method of Brain is written anew: nothing calls Brain's own.

        Args:
            name: The method.

        Returns:
            False where it is left alone, or calls ``super()``.
        """
        return name in self.chains and name not in self.reaches


class RecipeSource:
    """A script, and the files that its Brains come from.

    Args:
        script: The script.
        hparams: Its hyperparameters file, which may name Brains too.

    Attributes:
        path: The script.
        hparams: What is written in the hyperparameters file, if there is one.
        brains: Its Brains, in the order of their lines; then those that it imports, or its
            hyperparameters name.
        called: Dotted names of the functions that the script calls, and where.
        not_found: Names that the script imports as Brains and are in no file, and where.
        not_examined: Its classes that are based on these, and where.

    Raises:
        RecipeError: A file cannot be read, or is no Python or YAML.
    """

    def __init__(self, script: str | Path, hparams: str | Path | None = None) -> None:
        self.path = Path(script)
        self.hparams = None if hparams is None else HparamsSource(hparams)
        self._module = ModuleSource(self.path)
        # Python takes the folder that a link leads to.
        self._modules = Modules(self.path.resolve().parent)
        self.called = {
            self._module.full_name(node.func): Location(self.path.name, node.lineno)
            for node in self._module.nodes
            if isinstance(node, ast.Call)
        }
        classes = [ClassSource(n, self._module) for n in self._module.nodes
                   if isinstance(n, ast.ClassDef)]  # fmt: skip
        found = (self._brain(cls) for cls in [*classes, *self._from_elsewhere()])
        self.brains = [brain for brain in found if brain is not None]
        self.not_found = dict(self._missing())
        self.not_examined = dict(self._based_on_missing())

    def show(self, path: Path) -> str:
        """A file as it is shown: from the script's folder on.

        Args:
            path: The file.

        Returns:
            Its path within that folder, or in full.
        """
        script, path = self.path.resolve(), path.resolve()
        if path == script:
            return self.path.name
        inside = path.is_relative_to(script.parent)
        return str(path.relative_to(script.parent) if inside else path)

    def _from_elsewhere(self) -> list[ClassSource]:
        """Classes that the script uses, or its hyperparameters name, as more than bases."""
        bases = [base for cls in self._module.classes.values() for base in cls.node.bases]
        within_bases = {id(node) for base in bases for node in ast.walk(base)}
        used = [n for n in self._module.nodes if id(n) not in within_bases]
        names = {dotted_name(n) for n in used if isinstance(n, (ast.Attribute, ast.Name))}
        # A class is named by its last part.
        likely = sorted(name for name in names if name.rpartition(".")[2][:1].isupper())
        found = [self._modules.resolve(self._module, name) for name in likely]
        named = () if self.hparams is None else self.hparams.named
        found += [self._modules.follow(Reference(name), self.path) for name in named]
        classes = {id(c.node): c for c in found if isinstance(c, ClassSource)}
        return [c for c in classes.values() if c.module.path.resolve() != self.path.resolve()]

    def _missing(self) -> Iterator[tuple[str, int]]:
        """What is called a Brain, is imported and is in no file."""
        imports = (node for node in self._module.nodes if isinstance(node, ast.ImportFrom))
        for node in imports:
            package = "." * node.level + (node.module or "")
            for alias in node.names:
                if self._is_missing(alias.name, alias.asname):
                    yield f"{package}.{alias.name}", node.lineno
        for cls in self._module.classes.values():
            for base in cls.node.bases:
                if isinstance(base, ast.Attribute) and self._is_missing(dotted_name(base)):
                    yield self._module.full_name(base), base.lineno

    def _is_missing(self, name: str, local: str | None = None) -> bool:
        found = self._modules.resolve(self._module, local or name)
        return name.endswith("Brain") and found is None

    def _based_on_missing(self) -> Iterator[tuple[str, int]]:
        """Classes of the script that would be Brains by a base that is in no file."""
        examined = {brain.name for brain in self.brains}
        for name, cls in self._module.classes.items():
            written = [c for c in self._modules.ancestors(cls) if isinstance(c, ClassSource)]
            bases = {c.module.full_name(base) for c in written for base in c.node.bases}
            if name not in examined and bases & self.not_found.keys():
                yield name, cls.node.lineno

    def _brain(self, cls: ClassSource) -> BrainSource | None:
        """None for a class that is no Brain."""
        ancestors = self._modules.ancestors(cls)
        base = next((name for name in ancestors if isinstance(name, str)), None)
        if base is None:
            return None
        location = Location(self.show(cls.module.path), cls.node.lineno)
        brain = BrainSource(cls.node.name, location, base)
        written = [c for c in ancestors if isinstance(c, ClassSource)]
        levels = [self._methods(c, Kept()) for c in written]
        kept = _kept(levels)
        levels = [self._methods(c, kept) for c in written]
        for cls, level in zip(written, levels, strict=True):
            for method in level.values():
                self._read_handovers(method, cls.module, written, kept, [])
        for name in dict.fromkeys(name for level in levels for name in level):
            _add_chain(brain, name, levels)
        return brain

    def _methods(self, cls: ClassSource, kept: Kept) -> dict[str, Method]:
        """The methods of a class, and what takes the place of one: ``fit_batch = other``."""
        file, found = self.show(cls.module.path), {}
        for node in cls.node.body:
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    found[node.name] = read_method(node, cls.node.name, file, kept)
                case ast.Assign([ast.Name(name)]):
                    found[name] = Method(name, Location(file, node.lineno), cls.node.name)
        return found

    def _read_handovers(
        self,
        method: Method,
        module: ModuleSource,
        written: list[ClassSource],
        kept: Kept,
        within: list[Function],
    ) -> None:
        """Reads the functions that a method gives the Brain or its modules to."""
        for handover in method.handovers:
            if _is_harmless(handover, module):
                continue
            found = self._function(handover, module, written)
            if found is None and {ITSELF, MODULES} & {*handover.given.values()}:
                method.unread.append(handover)
            elif found is not None and found.node not in within:
                file = self.show(found.module.path)
                function = read_function(found.node, file, handover, kept)
                inner = [*within, found.node]
                self._read_handovers(function, found.module, written, kept, inner)
                method.absorb(function)

    def _function(
        self, handover: Handover, module: ModuleSource, written: list[ClassSource]
    ) -> FunctionSource | None:
        owner, _, name = handover.function.rpartition(".")
        if owner != "self":
            found = self._modules.resolve(module, handover.function)
            return found if isinstance(found, FunctionSource) else None
        methods = ((cls, node) for cls in written for node in cls.node.body)
        return next((FunctionSource(node, cls.module) for cls, node in methods
                     if isinstance(node, Function) and node.name == name), None)  # fmt: skip


def _kept(levels: list[dict[str, Method]]) -> Kept:
    """What attributes stand for; ``__init__`` is over before entries are in wrappers."""
    meanings: dict[str, str] = {}
    bare: dict[str, str] = {}
    for method in (method for level in levels for method in level.values()):
        for name, meaning in method.keeps.items():
            early = method.name == "__init__" and meaning != MODULES
            (bare if early else meanings)[name] = meaning
    return Kept({name: m for name, m in meanings.items() if name not in bare}, bare)


def _is_harmless(handover: Handover, module: ModuleSource) -> bool:
    """Functions of Python and torch use nothing of a Brain that a wrapper lacks."""
    first = handover.function.partition(".")[0]
    references = [reference.dotted for reference in module.names.get(first, [])]
    packages = {name.partition(".")[0] for name in references}
    # A partial calls what it is given.
    return hasattr(builtins, first) or bool(packages & WITHOUT_BRAINS - {"functools"})


def _add_chain(brain: BrainSource, name: str, levels: list[dict[str, Method]]) -> None:
    """Follows a method to those that it reaches by ``super()``, maybe to Brain's own."""
    chain = brain.chains[name] = []
    goes_on = True
    for level in levels:
        if name in level and goes_on:
            chain.append(level[name])
            goes_on = any(name in method.supers for method in level.values())
    if goes_on:
        brain.reaches.add(name)


def _merged(found: Iterable[Locations]) -> Locations:
    merged: Locations = {}
    for each in found:
        for name, locations in each.items():
            merged.setdefault(name, []).extend(locations)
    return merged
