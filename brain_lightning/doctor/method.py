"""One method of a Brain: what it reads, calls and changes of the Brain."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple


class Location(NamedTuple):
    """A line of a file."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


Locations = dict[str, list[Location]]


class EntryUse(NamedTuple):
    """What a method does with an entry of ``self.modules``, other than to call it.

    Attributes:
        entry: The entry, or ``EACH_ENTRY``.
        attribute: What is used of it; ``[]`` where it is indexed, empty where it is replaced.
        how: ``read``, ``set``, ``around`` (a call of what is in ``.module``), ``part`` (a call
            of a method or a part of it, whose path is ``attribute``), ``replace`` or ``kept``
            (what ``__init__`` has kept of it, which is not the wrapper).
        text: As it is written.
        at: Where.
        processes: ``one`` or ``several`` where a test asked for that before, else empty.
        learns: Whether gradients are recorded there.
    """

    entry: str
    attribute: str
    how: str
    text: str
    at: Location
    processes: str
    learns: bool


class HparamsCall(NamedTuple):
    """A call of something in ``self.hparams``.

    Attributes:
        name: What is called, or whose method is.
        method: Its method; empty where it is called itself.
        text: As it is written.
        at: Where.
        arguments: How many arguments it is given.
        learns: Whether gradients are recorded there.
        is_entry: Whether it is in ``self.hparams.modules``.
    """

    name: str
    method: str
    text: str
    at: Location
    arguments: int
    learns: bool
    is_entry: bool


class Handover(NamedTuple):
    """A call that gives the Brain, its modules or an entry of them to a function.

    Attributes:
        function: Its dotted name, ``self.name`` for a method; empty for something else.
        given: What it is given, by the index of the argument, or its keyword.
        at: Where.
        processes: As of ``EntryUse``.
        learns: As of ``EntryUse``.
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
    """A method of a Brain, and what it does.

    Attributes:
        name: Its name.
        at: Where it begins.
        owner: The class that it is written in.
        reads: Attributes of ``self``, and where.
        sets: Attributes of ``self`` that are assigned, and where.
        calls: Methods called on anything, and where: ``backward``, ``step``…
        optimizer_steps: Where ``step()`` of an optimizer is called.
        given: Methods of ``self`` that are called with arguments, and where.
        supers: Methods called on ``super()``, and where.
        super_in_branch: Those of them that are called under an ``if``.
        unwraps: Where ``.module`` of something else than ``self`` is read.
        entries: Entries of ``self.modules`` that are used.
        entry_uses: What is done with them other than to call them.
        hparams_calls: What is called in ``self.hparams``.
        keeps: Attributes of ``self`` that are assigned modules or an entry of them.
        handovers: What is given to functions.
        unread: Those of them whose function is in no file.
        on_main: What is called in the main process alone that saves, and where.
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
        """Takes what a function does that this method calls for what it does itself.

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
