"""The Brains of a recipe, read from its source without running it."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .hparams import HparamsSource
from .meaning import ITSELF, MODULES, Kept
from .method import EntryUse, Handover, HparamsCall, Location, Locations, Method
from .method_reader import read_function, read_method
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

# Methods that run in a training step.
LEARNING = ("fit_batch", "compute_forward", "compute_objectives", "on_fit_batch_start",
            "_fit_train", "fit")  # fmt: skip
# Hooks that do not belong to a training step.
OTHER_HOOKS = ("__init__", "on_stage_start", "on_stage_end", "on_fit_start", "init_optimizers",
               "on_evaluate_start", "evaluate_batch", "evaluate", "_fit_valid", "zero_grad",
               "make_dataloader", "on_fit_batch_end", "freeze_optimizers")  # fmt: skip


@dataclass
class BrainSource:
    """The source of a subclass of Brain.

    Attributes:
        name: Name of the class.
        location: First line of the class.
        base: ``SpeechBrain's Brain`` or ``brain_lightning's Brain``.
        chains: For each method name the method, and the methods of base classes that it
            reaches by ``super()``, in this order.
        reaches: Names of the methods that are not overridden, or that call ``super()`` up to
            Brain's method.
    """

    name: str
    location: Location
    base: str
    chains: dict[str, list[Method]] = field(default_factory=dict)
    reaches: set[str] = field(default_factory=set)

    @property
    def methods(self) -> dict[str, Location]:
        """Its methods, including those of bases within the recipe, with their locations."""
        return {name: chain[0].at for name, chain in self.chains.items()}

    @property
    def reads(self) -> Locations:
        """Attributes of ``self`` that its methods read, with their locations."""
        return _merged(method.reads for method in self.every())

    @property
    def calls(self) -> Locations:
        """Methods that it calls on any object, such as ``backward``, with their locations."""
        return _merged(method.calls for method in self.every())

    @property
    def supers(self) -> Locations:
        """Methods that it calls on ``super()``, with their locations."""
        return _merged(method.supers for method in self.every())

    @property
    def unwraps(self) -> list[Location]:
        """Locations where ``.module`` of an object other than ``self`` is read."""
        return [at for method in self.every() for at in method.unwraps]

    @property
    def entries(self) -> set[str]:
        """Entries of ``self.modules`` that it uses."""
        return {entry for method in self.every() for entry in method.entries}

    @property
    def entry_uses(self) -> list[EntryUse]:
        """Uses of entries of ``self.modules`` after ``__init__``, when they may be wrapped."""
        after = [method for method in self.every() if method.name != "__init__"]
        return [use for method in after for use in method.entry_uses]

    @property
    def learning(self) -> list[Method]:
        """Its methods that may run in a training step."""
        names = self.reached_from(LEARNING)
        # A helper that no hook calls by name may be called from anywhere.
        others = self.chains.keys() - self.reached_from((*LEARNING, *OTHER_HOOKS))
        return list(self.every(names | others))

    @property
    def hparams_calls(self) -> list[HparamsCall]:
        """Its calls of objects in ``self.hparams`` in a training step."""
        calls = (call for method in self.learning for call in method.hparams_calls)
        return [call for call in calls if call.learns]

    def every(self, names: Iterable[str] | None = None) -> Iterator[Method]:
        """Yields the methods that may be called. Methods that are overridden are left out.

        Args:
            names: Names of the methods. Default: all.

        Yields:
            The methods.
        """
        chosen = self.chains.keys() if names is None else set(names)
        for name, chain in self.chains.items():
            yield from chain if name in chosen else ()

    def reached_from(self, names: Iterable[str]) -> set[str]:
        """Returns its methods that some methods call, directly or through other methods.

        Args:
            names: Names of the calling methods.

        Returns:
            Names of the methods, including the calling methods that it has.
        """
        found: set[str] = set()
        ahead = set(names) & self.chains.keys()
        while ahead:
            found |= ahead
            read = {name for method in self.every(ahead) for name in method.reads}
            ahead = (read & self.chains.keys()) - found
        return found

    def is_replaced(self, name: str) -> bool:
        """Returns whether a method of Brain is overridden and Brain's method is not called.

        Args:
            name: Name of the method.

        Returns:
            False if it is not overridden, or calls ``super()``.
        """
        return name in self.chains and name not in self.reaches


class RecipeSource:
    """The source of a script, and of the files of its Brains.

    Args:
        script: Path of the script.
        hparams: Path of its hyperparameters file, which may also name Brains.

    Attributes:
        path: Path of the script.
        hparams: Source of the hyperparameters file, or None.
        brains: Brains of the script in the order of their lines, then the Brains that it
            imports or that the hyperparameters file names.
        called: Full names of the functions that the script calls, with their locations.
        not_found: Names that the script imports as Brains and whose file was not found, with
            their lines.
        not_examined: Classes with such a name as a base, with their lines.

    Raises:
        RecipeError: A file cannot be read, or is not valid Python or YAML.
    """

    def __init__(self, script: str | Path, hparams: str | Path | None = None) -> None:
        self.path = Path(script)
        self.hparams = None if hparams is None else HparamsSource(hparams)
        self._module = ModuleSource(self.path)
        # As Python does: the folder of the link's target.
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
        """Returns the name of a file to show in locations.

        Args:
            path: Path of the file.

        Returns:
            Path relative to the script's folder, or absolute if the file is elsewhere.
        """
        script, path = self.path.resolve(), path.resolve()
        if path == script:
            return self.path.name
        inside = path.is_relative_to(script.parent)
        return str(path.relative_to(script.parent) if inside else path)

    def _from_elsewhere(self) -> list[ClassSource]:
        """Returns classes of other files that the script uses or its hyperparameters name."""
        bases = [base for cls in self._module.classes.values() for base in cls.node.bases]
        within_bases = {id(node) for base in bases for node in ast.walk(base)}
        used = [n for n in self._module.nodes if id(n) not in within_bases]
        names = {dotted_name(n) for n in used if isinstance(n, (ast.Attribute, ast.Name))}
        # Only names whose last part begins with a capital letter are likely to be classes.
        likely = sorted(name for name in names if name.rpartition(".")[2][:1].isupper())
        found = [self._modules.resolve(self._module, name) for name in likely]
        named = () if self.hparams is None else self.hparams.named
        found += [self._modules.follow(Reference(name), self.path) for name in named]
        classes = {id(c.node): c for c in found if isinstance(c, ClassSource)}
        return [c for c in classes.values() if c.module.path.resolve() != self.path.resolve()]

    def _missing(self) -> Iterator[tuple[str, int]]:
        """Yields imported names that end with Brain, and whose file was not found."""
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
        """Yields classes of the script with a base whose file was not found."""
        examined = {brain.name for brain in self.brains}
        for name, cls in self._module.classes.items():
            written = [c for c in self._modules.ancestors(cls) if isinstance(c, ClassSource)]
            bases = {c.module.full_name(base) for c in written for base in c.node.bases}
            if name not in examined and bases & self.not_found.keys():
                yield name, cls.node.lineno

    def _brain(self, cls: ClassSource) -> BrainSource | None:
        """Reads a class. Returns None if it is not a Brain."""
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
        """Returns the methods of a class, including assignments: ``fit_batch = other``."""
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
        """Reads the functions to which a method passes the Brain or its modules."""
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
    """Returns the meanings of attributes. Those from ``__init__`` have no wrapper."""
    meanings: dict[str, str] = {}
    bare: dict[str, str] = {}
    for method in (method for level in levels for method in level.values()):
        for name, meaning in method.keeps.items():
            early = method.name == "__init__" and meaning != MODULES
            (bare if early else meanings)[name] = meaning
    return Kept({name: m for name, m in meanings.items() if name not in bare}, bare)


def _is_harmless(handover: Handover, module: ModuleSource) -> bool:
    """Returns whether a function is Python's or torch's. These work with wrapped entries."""
    first = handover.function.partition(".")[0]
    references = [reference.dotted for reference in module.names.get(first, [])]
    packages = {name.partition(".")[0] for name in references}
    # functools.partial calls the object that it gets.
    return hasattr(builtins, first) or bool(packages & WITHOUT_BRAINS - {"functools"})


def _add_chain(brain: BrainSource, name: str, levels: list[dict[str, Method]]) -> None:
    """Adds a method, and the methods that it reaches by ``super()``."""
    chain = brain.chains[name] = []
    calls_super = True
    for level in levels:
        if name in level and calls_super:
            chain.append(level[name])
            calls_super = any(name in method.supers for method in level.values())
    if calls_super:
        brain.reaches.add(name)


def _merged(found: Iterable[Locations]) -> Locations:
    merged: Locations = {}
    for each in found:
        for name, locations in each.items():
            merged.setdefault(name, []).extend(locations)
    return merged
