"""One method of a Brain: what it reads, calls and changes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple


class Location(NamedTuple):
    """A file and a line."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


Locations = dict[str, list[Location]]


class EntryUse(NamedTuple):
    """A use of an entry of ``self.modules`` other than a call of the entry.

    Attributes:
        entry: Name of the entry, or ``EACH_ENTRY``.
        attribute: Attribute of the entry that is used. ``[]`` if the entry is indexed, empty
            if it is replaced.
        how: ``read``, ``set``, ``around`` (a call that bypasses the wrapper by ``.module``),
            ``part`` (a call of a method or a submodule with the path ``attribute``),
            ``replace``, or ``kept`` (a reference from ``__init__``, which has no wrapper).
        text: Source text of the expression.
        at: Location of the expression.
        processes: ``one`` or ``several`` if an enclosing test requires it, else empty.
        learns: Whether gradients are recorded.
    """

    entry: str
    attribute: str
    how: str
    text: str
    at: Location
    processes: str
    learns: bool


class HparamsCall(NamedTuple):
    """A call of an object in ``self.hparams``.

    Attributes:
        name: Name of the object.
        method: Method of the object that is called, or empty if the object itself is called.
        text: Source text of the called expression.
        at: Location of the call.
        arguments: Number of arguments.
        learns: Whether gradients are recorded.
        is_entry: Whether the object is in ``self.hparams.modules``.
    """

    name: str
    method: str
    text: str
    at: Location
    arguments: int
    learns: bool
    is_entry: bool


class Handover(NamedTuple):
    """A call that passes the Brain, its modules or one of their entries to a function.

    Attributes:
        function: Dotted name of the function, ``self.name`` for a method, empty otherwise.
        given: Meaning of each such argument, by its index or keyword.
        at: Location of the call.
        processes: See ``EntryUse``.
        learns: See ``EntryUse``.
    """

    function: str
    given: dict[int | str, str]
    at: Location
    processes: str
    learns: bool


def _locations() -> Locations:
    return defaultdict(list)


@dataclass
class Method:
    """A method of a Brain, and what it does. Names are mapped to their locations.

    Attributes:
        name: Name of the method.
        at: Its first line.
        owner: Name of the class that defines it.
        reads: Attributes of ``self`` that are read.
        sets: Attributes of ``self`` that are assigned.
        calls: Methods that are called on any object: ``backward``, ``step``…
        optimizer_steps: Calls of ``step()`` of an optimizer.
        given: Methods of ``self`` that are called with arguments.
        supers: Methods that are called on ``super()``.
        super_in_branch: Names in ``supers`` that are called within an ``if``.
        unwraps: Reads of ``.module`` of objects other than ``self``.
        entries: Entries of ``self.modules`` that are used.
        entry_uses: Uses of the entries other than calls of them.
        hparams_calls: Calls of objects in ``self.hparams``.
        keeps: Attributes of ``self`` to which the modules or an entry are assigned.
        handovers: Calls that pass the Brain or its modules to a function.
        unread: The calls in ``handovers`` whose function was not found in a file.
        on_main: Calls that save a state, and that only the main process makes.
    """

    name: str
    at: Location
    owner: str
    reads: Locations = field(default_factory=_locations)
    sets: Locations = field(default_factory=_locations)
    calls: Locations = field(default_factory=_locations)
    optimizer_steps: list[Location] = field(default_factory=list)
    given: Locations = field(default_factory=_locations)
    supers: Locations = field(default_factory=_locations)
    super_in_branch: set[str] = field(default_factory=set)
    unwraps: list[Location] = field(default_factory=list)
    entries: set[str] = field(default_factory=set)
    entry_uses: list[EntryUse] = field(default_factory=list)
    hparams_calls: list[HparamsCall] = field(default_factory=list)
    keeps: dict[str, str] = field(default_factory=dict)
    handovers: list[Handover] = field(default_factory=list)
    unread: list[Handover] = field(default_factory=list)
    on_main: list[tuple[str, Location]] = field(default_factory=list)

    def absorb(self, function: Method) -> None:
        """Adds what a function does that this method calls.

        Args:
            function: The function.
        """
        for name in ("reads", "sets", "calls"):
            for key, locations in getattr(function, name).items():
                getattr(self, name)[key].extend(locations)
        self.entries |= function.entries
        self.unwraps += function.unwraps
        self.optimizer_steps += function.optimizer_steps
        self.entry_uses += function.entry_uses
        self.hparams_calls += function.hparams_calls
        self.unread += function.unread
        self.on_main += function.on_main
