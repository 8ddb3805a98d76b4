"""Compares the events of two runs of a recipe, and finds their first difference."""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

from .evidence import NOTHING, Evidence

Event = Mapping[str, Any]
# Number of hooks to show before and after the first one that differs.
CONTEXT = 3


@dataclass(frozen=True)
class Comparison:
    """The events of both sides.

    Attributes:
        theirs: Events on SpeechBrain's loop.
        ours: Events on the Trainer.
        evidence: Counts of the batches that the Trainer ran.
    """

    theirs: Sequence[Event]
    ours: Sequence[Event]
    evidence: Evidence = field(default_factory=Evidence)

    @property
    def verified(self) -> bool:
        """Whether all events are equal, no error was raised, and a Trainer ran its batches."""
        return self.equal and not self.error and not self.missing

    @property
    def missing(self) -> str:
        """What makes the equality of all events no proof, or empty."""
        return self.evidence.missing() if self.theirs else NOTHING

    @property
    def equal(self) -> bool:
        """Whether all events of both sides are bitwise identical."""
        return self.theirs == self.ours

    @property
    def error(self) -> str | None:
        """The error that the recipe raised on SpeechBrain's loop, or None."""
        return next((event["error"] for event in _of_kind("error", self.theirs)), None)

    @property
    def first_difference(self) -> str | None:
        """The first event that differs, with its epoch, step and tensor, or None."""
        pairs = zip_longest(self.theirs, self.ours)
        return next((describe(theirs, ours) for theirs, ours in pairs if theirs != ours), None)

    def without_hooks(self, names: Collection[str]) -> Comparison:
        """Returns a comparison that ignores the calls of some hooks.

        Args:
            names: Hooks that are called on one side only, and have no effect there.
        """
        theirs, ours = (
            [e for e in events if str(e.get("hook")).partition("(")[0] not in names]
            for events in (self.theirs, self.ours)
        )
        return replace(self, theirs=theirs, ours=ours)

    def as_json(self) -> str:
        """Returns the steps, stages and hooks of both sides and the verdict, for scripts."""
        found = {
            side: {
                "steps": steps_of(events),
                "stages": [_end(event) for event in _of_kind("stage", events)],
                "hooks": hooks_of(events),
            }
            for side, events in (("speechbrain", self.theirs), ("trainer", self.ours))
        }
        verdict = {
            "equal": self.equal,
            "first_difference": self.first_difference,
            "verified": self.verified,
            "error": self.error,
            "without_trainer": self.evidence.without_trainer,
            "own_loops": self.evidence.own_loops,
        }
        return json.dumps({**verdict, **found}, indent=1)

    def as_text(self) -> str:
        """Returns tables of the steps and stages, and the verdict, for people."""
        return "\n".join(
            [*self._steps(), "", *self._stages(), "", *self._hooks(), "", *self._verdict()]
        )

    def _verdict(self) -> Iterator[str]:
        if self.error:
            yield f"The recipe raised an error on SpeechBrain's loop: {self.error}"
        if not self.equal:
            yield f"DIFFERENT: {self.first_difference}"
        elif self.missing:
            yield f"NOT VERIFIED: {self.missing}"
        elif self.error:
            yield "NOT VERIFIED: all events before the error are equal on both sides."
        else:
            yield "EQUAL: all events are bitwise identical on both sides."
            if note := self.evidence.note():
                yield note

    def _steps(self) -> Iterator[str]:
        yield _line(
            ["", "", "loss", "", "learning rate", "", "gradient norm", "", "weights", ""]
        )
        yield _line(["epoch", "step", *["SpeechBrain", "Trainer"] * 4])
        for pair in zip_longest(steps_of(self.theirs), steps_of(self.ours)):
            some = pair[0] or pair[1]
            cells = _cells(pair, ["loss", "rates", "norms", "weights"])
            yield _line([some["epoch"], some["step"], *cells]) + _mark(*pair)

    def _stages(self) -> Iterator[str]:
        yield _line(["end of", "epoch", "loss", "", "weights", "", "", "", "", ""])
        for pair in zip_longest(_of_kind("stage", self.theirs), _of_kind("stage", self.ours)):
            some, ends = pair[0] or pair[1], [_end(event) if event else None for event in pair]
            epoch = "-" if some["epoch"] is None else some["epoch"]
            cells = _cells(ends, ["loss", "weights"])
            yield _line([some["stage"], epoch, *cells]) + _mark(*pair)

    def _hooks(self) -> Iterator[str]:
        theirs, ours = hooks_of(self.theirs), hooks_of(self.ours)
        if theirs == ours:
            yield f"hooks: {len(ours)} calls, in the same order on both sides"
            return
        pairs = list(zip_longest(theirs, ours, fillvalue="-"))
        first = next(i for i, (one, other) in enumerate(pairs) if one != other)
        yield f"hooks: call {first + 1} differs"
        for one, other in pairs[max(0, first - CONTEXT) : first + CONTEXT + 1]:
            yield f"  {one:<40} {other:<40}{_mark(one, other)}"


def steps_of(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Returns the training batches among the events.

    Args:
        events: Events of one side.

    Returns:
        One dict per batch whose loss was averaged: ``epoch``, ``step`` (from 1), ``loss``, the
        learning ``rates`` of all parameter groups, the ``norms`` of the clipped gradients
        of each update, and a digest of the ``weights`` after the last update.
    """
    steps: list[dict[str, Any]] = []
    updates: list[Event] = []
    for event in events:
        updates.append(event)
        if event["kind"] == "loss" and event["stage"] == "TRAIN":
            applied = _of_kind("gradients", updates)
            changed = [update["tensors"] for update in _of_kind("weights", updates)]
            step = {name: event[name] for name in ("epoch", "step", "loss")}
            step["rates"] = [rate for update in applied for rate in update["rates"]]
            step["norms"] = [update["norm"] for update in applied]
            step["weights"] = _digest(changed) if changed else "-"
            steps.append(step)
            updates = []
    return steps


def hooks_of(events: Sequence[Event]) -> list[str]:
    """Returns the hooks among the events.

    Args:
        events: Events of one side.

    Returns:
        Names of the hooks, with the stage that was passed to them.
    """
    return [event["hook"] for event in _of_kind("hook", events)]


def _of_kind(kind: str, events: Sequence[Event]) -> list[Event]:
    return [event for event in events if event["kind"] == kind]


def describe(theirs: Event | None, ours: Event | None) -> str:
    """Describes how the events of the two sides differ.

    Args:
        theirs: Event on SpeechBrain's loop, or None if that side has ended.
        ours: Event on the Trainer, or None if that side has ended.

    Returns:
        The stage, epoch and step of the event, and the difference.
    """
    if theirs is None or ours is None:
        sides = ("SpeechBrain", "Trainer") if ours is None else ("Trainer", "SpeechBrain")
        event = theirs or ours or {}
        return f"{_when(event)}: {sides[0]} continues with {_what(event)}, {sides[1]} ended"
    if theirs["kind"] != ours["kind"] or theirs["kind"] == "hook":
        both = f"SpeechBrain {_what(theirs)}, Trainer {_what(ours)}"
        return f"{_when(theirs)}: {both} ({_when(ours)})"
    return f"{_when(theirs)}: {_difference(theirs, ours)}"


def _when(event: Event) -> str:
    epoch = "" if event["epoch"] is None else f"epoch {event['epoch']}, "
    return f"{event['stage'] or 'between stages'}, {epoch}step {event['step']}"


def _what(event: Event) -> str:
    return str(event.get("hook") or event.get("error") or event["kind"])


def _difference(theirs: Event, ours: Event) -> str:
    """Describes the difference of two events of one kind. A cause comes before its effect."""

    def both(name: str) -> str:
        return f"{theirs[name]} (SpeechBrain) and {ours[name]} (Trainer)"

    match theirs["kind"]:
        case "gradients" if theirs["rates"] != ours["rates"]:
            return f"learning rates {both('rates')}"
        case "gradients":
            tensors = _tensors(theirs["tensors"], ours["tensors"])
            return f"gradients: {tensors}; norm {both('norm')}"
        case "weights":
            return f"weights after the update: {_tensors(theirs['tensors'], ours['tensors'])}"
        case "stage" if theirs["loss"] == ours["loss"]:
            tensors = _tensors(theirs["weights"], ours["weights"])
            return f"weights at the end of the stage: {tensors}"
        case "stage":
            return f"stage loss {both('loss')}"
        case "error":
            return f"error {both('error')}"
    return f"loss {both('loss')}"


def _tensors(theirs: Mapping[str, int], ours: Mapping[str, int]) -> str:
    names = dict.fromkeys([*theirs, *ours])
    differing = [name for name in names if theirs.get(name) != ours.get(name)]
    return f"{len(differing)} of {len(names)} tensors differ, the first is {differing[0]!r}"


def _end(event: Event) -> dict[str, Any]:
    """Returns the loss and a digest of the weights at the end of a stage."""
    shown = {name: event[name] for name in ("stage", "epoch", "loss")}
    return {**shown, "weights": _digest([event["weights"]])}


def _digest(tensors: Sequence[Mapping[str, int]]) -> str:
    return format(zlib.crc32(repr(tensors).encode()), "08x")


def _cells(sides: Sequence[Mapping[str, Any] | None], names: Sequence[str]) -> list[str]:
    """Returns each value of both sides, next to each other."""
    return [_cell(side[name]) if side else "-" for name in names for side in sides]


def _cell(value: str | list[str]) -> str:
    if isinstance(value, str):
        return _short(value)
    shown = [_short(number) for number in dict.fromkeys(value)]
    return " ".join(shown[:2]) + (" …" if len(shown) > 2 else "") if shown else "-"


def _short(number: str) -> str:
    try:
        return f"{float(number):.6g}" if not number.isalnum() else number
    except ValueError:
        return number


def _mark(theirs: object, ours: object) -> str:
    return "" if theirs == ours else "  <-- differs"


def _line(cells: Sequence[Any]) -> str:
    widths = (6, 5) + (13,) * (len(cells) - 2)
    padded = [f"{cell!s:<{width}}" for cell, width in zip(cells, widths, strict=True)]
    return " ".join(padded).rstrip()
