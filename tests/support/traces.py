"""Whether the trace of a resumed run is the rest of that of the run that was left alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .events import Event

FETCHES = ("fetch TRAIN", "collate TRAIN")
# From the fetch of its first sample to the end of its fit.
IN_A_BATCH = (
    "fetch TRAIN", "collate TRAIN", "callback.on_train_batch_start", "on_fit_batch_start",
    "compute_forward TRAIN", "compute_objectives TRAIN", "callback.on_before_backward",
    "callback.on_after_backward", "callback.on_before_zero_grad",
    "callback.on_before_optimizer_step", "step", "stepped", "forward", "objectives",
    "between parts", "on_fit_batch_end",
)  # fmt: skip


class Trace:
    """The trace of a run that was left alone.

    Where a validation is in the middle of an epoch, the next batch has been fetched before
    it. It is fetched again by who resumes during or after the validation, which then is not
    made again. So traces are compared in an order in which it is fetched after it.

    Args:
        events: All of its events.

    Attributes:
        events: As they were.
    """

    def __init__(self, events: Sequence[Event]) -> None:
        self.events = list(events)
        self._ordered = _ordered(self.events)
        keys = [event.key for event in self._ordered]
        self._places = {key: index for index, key in enumerate(keys)}
        assert len(self._places) == len(keys), "two events have the same name and place"
        # Where what is not over begins, by event.
        self._begins = self._beginnings()
        self._within = self._epochs()

    def __len__(self) -> int:
        return len(self.events)

    def _beginnings(self) -> list[int]:
        found: list[int] = []
        batch = valid = None
        ended = 0
        for index, event in enumerate(self._ordered):
            begin = index
            if event.name in IN_A_BATCH:
                begin = ended = batch = index if batch is None else batch
            elif event.name == "callback.on_train_batch_end":
                begin = ended
            elif event.name == "on_stage_start VALID":
                valid = index
            if valid is not None:
                begin = valid
            if event.name == "on_fit_batch_end":
                batch = None
            if event.name == "on_stage_end VALID":
                valid = None
            found.append(begin)
        return found

    def _epochs(self) -> list[bool]:
        """Whether who goes on with an event hears the start of the TRAIN stage again."""
        starts, over = 0, {}
        for index, event in enumerate(self._ordered):
            starts += event.name == "on_stage_start TRAIN"
            if event.name in ("on_stage_end TRAIN", "on_stage_end VALID"):
                over[starts] = index
        within, found = False, []
        for index, event in enumerate(self._ordered):
            found.append(within)
            if event.name == "on_stage_start TRAIN":
                within = True
            if index in over.values():
                within = False
        return [*found, False]

    def may_begin(self, point: int, by_error: bool) -> set[int]:
        """Where a run that was interrupted may go on, as ``differs`` takes it.

        Args:
            point: The number of the event at which it was interrupted.
            by_error: Whether it was not done; otherwise it was done, and then saved.
        """
        name = self.events[point].name
        fetched = self._fetched_for_later(point)
        if fetched is not None:
            return {fetched}
        point = self._places[self.events[point].key]
        begin = self._begins[point]
        if name == "stepped" or (name == "on_fit_batch_end" and by_error):
            # Whether its update is complete is a matter of taste.
            return {begin, point, point + 1}
        if by_error:
            return {begin} if name in IN_A_BATCH else {begin, point}
        if name == "on_stage_start VALID":
            return {point, point + 1}
        is_over = name in (
            "on_fit_batch_end",
            "callback.on_train_batch_end",
            "on_stage_end VALID",
        )
        not_in_anything = begin == point and name not in IN_A_BATCH
        return {point + 1} if is_over or not_in_anything else {begin}

    def _fetched_for_later(self, point: int) -> int | None:
        """Where the validation begins before which an event fetches a batch."""
        for event in self.events[point:]:
            if not event.name.startswith(FETCHES):
                is_start = event.name == "on_stage_start VALID"
                is_fetch = self.events[point].name.startswith(FETCHES)
                return self._places[event.key] if is_start and is_fetch else None
        return None

    def differs(
        self, heard: Sequence[Event], begins: set[int] | range, end: int | None = None
    ) -> str | None:
        """What is wrong with the trace of a resumed run.

        Args:
            heard: Its events; within an epoch, the start of its TRAIN stage comes once more
                before them.
            begins: Where it may begin.
            end: The number of events up to where it was interrupted again.
        """
        expected = _ordered(self.events[:end])
        starts = (0, 1) if heard and heard[0].name == "on_stage_start TRAIN" else (0,)
        problems = [
            self._compare(_ordered(rest), expected, begins, bool(again))
            for again in starts
            for rest in (_without_refetch(heard[again:]), heard[again:])
        ]
        return None if None in problems else problems[-1]

    def _compare(
        self,
        heard: Sequence[Event],
        expected: Sequence[Event],
        begins: set[int] | range,
        again: bool,
    ) -> str | None:
        start = len(expected) - len(heard)
        problem = _first_difference(heard, expected[max(start, 0) :])
        if problem is None and start not in begins:
            where = " or ".join(self._name(index) for index in sorted(begins)[:2])
            return f"begins: with {self._name(start)}, not {where}"
        if problem is None and again != self._within[start]:
            times = "once more" if again else "not"
            return f"begins: with on_stage_start TRAIN {times} before it"
        if problem is None or problem.startswith("told"):
            return problem
        keys = {event.key: index for index, event in enumerate(expected)}
        first = keys.get(heard[0].key) if heard else None
        if first is None:
            return f"begins: with {heard[0] if heard else 'nothing'}, which is out of place"
        return _first_difference(heard, expected[first:]) or "begins: at two places"

    def _name(self, index: int) -> str:
        return str(self._ordered[index]) if 0 <= index < len(self) else "the end"


def _without_refetch(heard: Sequence[Event]) -> Sequence[Event]:
    """A fitted batch is fetched again for callbacks that have not heard of it."""
    fetched = 0
    while fetched < len(heard) and heard[fetched].name.startswith(FETCHES):
        fetched += 1
        if heard[fetched - 1].name.startswith("collate"):
            break
    return heard[fetched:]


def _ordered(events: Sequence[Event]) -> list[Event]:
    """What is fetched right before a validation comes after it."""
    found: list[Event] = []
    fetched: list[Event] = []
    for event in events:
        in_valid = "VALID" in event.name or event.name.startswith("callback.on_validation")
        if event.name.startswith(FETCHES):
            fetched.append(event)
        else:
            if not in_valid:
                found += fetched
                fetched = []
            found.append(event)
    return found + fetched


def _first_difference(heard: Sequence[Event], expected: Sequence[Event]) -> str | None:
    told = None
    for index in range(max(len(heard), len(expected))):
        one = heard[index] if index < len(heard) else None
        other = expected[index] if index < len(expected) else None
        if one is None or other is None or one.key != other.key:
            if told is not None:
                return told
            after = heard[index - 1] if index else "the beginning"
            return f"order: {one or 'the end'} instead of {other or 'the end'} after {after}"
        if one.told != other.told and told is None:
            told = f"told: {one}: {one.told} instead of {other.told}"
    return told


def different(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """What differs between two flat states, which is equal bit for bit otherwise."""
    problems = []
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected:
            problems.append(f"{name} is {'new' if name in found else 'missing'}")
        elif not _equal(found[name], expected[name]):
            problems.append(
                f"{name}: {_short(found[name])} instead of {_short(expected[name])}"
            )
    return problems


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _short(value: Any) -> str:
    return f"{value.tolist() if isinstance(value, torch.Tensor) else value!r}"[:60]
