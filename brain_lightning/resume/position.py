"""What a position in data is, and the positions of loaders that are made of other loaders."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

from brain_lightning.data.several_loaders import SeveralLoaders
from brain_lightning.temporary import TemporaryAttributes

from .plain_values import State
from .random_state import random_state, set_random_state

logger = logging.getLogger(__name__)


class Position:
    """A position in data: how far a pass over them is, and how it is resumed.

    Attributes:
        fitted: Batches of this pass that have been fitted.
        records_fetches: Whether to record the state before each batch is fetched. Needed
            where a checkpoint may be saved between fetching a batch and fitting it.
        passes: Of one among several: the passes that have begun in theirs.
    """

    def __init__(self) -> None:
        self.fitted = 0
        self.records_fetches = False
        self.passes = 0
        self._fetched = 0
        # Whether the next batch is being fetched, or could not be.
        self._fetching = False
        # Whether the pass has ended: a stream that is asked again may start again.
        self._over = False
        self._before_fetch: State | None = None
        self._resumed: State | None = None

    def state(self, fitted: int, after_fetch: State | None) -> State:
        """The state to resume from, within a pass.

        Args:
            fitted: The number of batches after which to resume.
            after_fetch: The random state with which to fit the next batch, if that was
                fetched already; None for the state that fetching it leaves.
        """
        raise NotImplementedError

    def state_between_passes(self) -> State:
        """The state to resume from before the next pass."""
        raise NotImplementedError

    def resume(self, state: State, loader: Any) -> None:
        """Restores a state, which takes effect in the next pass.

        Args:
            state: From ``state`` or ``state_between_passes``. It is changed where the
                batches of the loader are not those that it was saved with.
            loader: What ``fit`` was given; the epoch of its sampler is set later.
        """
        raise NotImplementedError

    def count(self) -> None:
        """Counts a batch that is fitted."""
        self.fitted += 1

    def can_fetch_again(self) -> bool:
        """Whether the batch that was fetched last could be fetched again, and be the same."""
        return self._before_fetch is not None

    def batches(self, loader: Any) -> Iterator[Any]:
        """One pass over the data, from the resumed position on; begins with its first batch.

        Args:
            loader: What ``fit`` was given.

        Yields:
            The batches.
        """
        yield from self.begin(loader)

    def begin(self, loader: Any) -> Iterator[Any]:
        """The same, and begins at once.

        Args:
            loader: What ``fit`` was given.
        """
        resumed, self._resumed = self._resumed or {}, None
        iterator = self._begin(loader, resumed)
        self._over = resumed.get("over", False)
        return self._batches(iterator, resumed.get("drawn"))

    def _batches(self, iterator: Iterator[Any], after_fetch: State | None) -> Iterator[Any]:
        while not self._over:
            self._record()
            self._fetching = True
            try:
                batch = self._fetch(iterator)
            except StopIteration:
                self._over, self._fetching = True, False
                return
            self._fetching = False
            if after_fetch is not None:
                set_random_state(after_fetch)
                after_fetch = None
            yield batch

    def _begin(self, loader: Any, resumed: State) -> Iterator[Any]:
        raise NotImplementedError

    def _record(self) -> None:
        """Records what fetching the next batch changes."""
        raise NotImplementedError

    def _fetch(self, iterator: Iterator[Any]) -> Any:
        raise NotImplementedError

    # ------------------------------------------------------------- one among several

    def part_state(self) -> State:
        """The state to resume from, of one among several, whose random state is theirs."""
        if self._resumed is not None:
            return self._resumed
        if not self.passes or self._over:
            over = self.passes > 0
            return {**self.state_between_passes(), "passes": self.passes, "over": over}
        state = self.state(self._fetched, None)
        draw = {name: value for name, value in state["draw"].items() if name != "random"}
        return {**state, "draw": draw, "passes": self.passes}

    def part_between_passes(self) -> State:
        """The same, before the next pass of all."""
        return {**self.state_between_passes(), "passes": 0, "over": False}

    def begin_part(self, resumes: bool) -> int:
        """Called when all begin a pass.

        Args:
            resumes: Whether it is the one that is resumed.

        Returns:
            How many passes of its own were over in that.
        """
        if self._resumed is not None and not resumes:
            self._resumed = {**self._resumed, "passes": 0, "over": False}
        self.passes = max(0, (self._resumed or {}).get("passes", 0) - 1)
        return self.passes

    def mark(self, records: bool) -> Position:
        """The position of one among several as it is now, for ``part_state``; it is cheap.

        Args:
            records: Whether to keep as well what fetching a batch changes in a loader.
        """
        raise NotImplementedError


class MakePosition(Protocol):
    """Makes the position in the data of a loader (``data_position.position_in``)."""

    def __call__(self, loader: Any, last: Position | None = None) -> Position:
        """Makes one, or takes the last one.

        Args:
            loader: The loader.
            last: In the data of the pass before.
        """


@dataclass
class Part:
    """One of the loaders that are iterated together, which tells its position of each pass.

    Attributes:
        loader: The loader.
        position: In its data.
    """

    loader: Any
    position: Position

    def __iter__(self) -> Iterator[Any]:
        self.position.passes += 1
        return PartPass(self.position, self.position.begin(self.loader))


@dataclass
class PartPass(Iterator[Any]):
    """One pass over a ``Part``.

    Attributes:
        position: In its data.
        batches: The batches.
    """

    position: Position
    batches: Iterator[Any]

    def __next__(self) -> Any:
        return next(self.batches)


class _Joint(Position):
    """The position of loaders that are iterated together.

    All of them may have fetched when one batch is, so their positions are kept as they
    were before.
    """

    def __init__(self, make: MakePosition) -> None:
        super().__init__()
        self._make = make
        self._parts: list[Position] = []
        self._marked: Sequence[Position] = ()

    def state(self, fitted: int, after_fetch: State | None) -> State:
        """See ``Position``."""
        ahead = self._fetched > fitted
        begun, over = ahead or self._fetching, self._over and not ahead
        before = self._before_fetch if begun else None
        parts = self._marked if begun else self._parts
        return {
            "batches": fitted,
            "parts": [self._state_of(part, over) for part in parts],
            "draw": {"random": random_state()} if before is None else before,
            "drawn": after_fetch if ahead else None,
            "over": over,
        }

    def _state_of(self, part: Position, over: bool) -> State:
        return part.part_between_passes() if over else part.part_state()

    def mark(self, records: bool) -> Position:
        """See ``Position``."""
        marked = copy.copy(self)
        marked._parts = [part.mark(records) for part in self._parts]
        marked._fetching = False
        return marked

    def _record(self) -> None:
        if self.passes:
            # All that it is one of keep it.
            return
        records = self.records_fetches
        self._before_fetch = {"random": random_state()} if records else None
        self._marked = [part.mark(records) for part in self._parts]

    def _fetch(self, iterator: Iterator[Any]) -> Any:
        batch = next(iterator)
        self._fetched += 1
        return batch

    def count(self) -> None:
        """See ``Position``."""
        super().count()
        self._count_parts()

    def _count_parts(self) -> None:
        """What a loader saves of its own position is what was fitted of it."""
        for part in self._parts:
            part.fitted = part._fetched
            if isinstance(part, _Joint):
                part._count_parts()

    def _begin(self, loader: Any, resumed: State) -> Iterator[Any]:
        self._before_fetch, self._fetching = None, False
        self.fitted = self._fetched = resumed.get("batches", 0)
        draw = resumed.get("draw", {}).get("random")
        if draw is not None:
            set_random_state(draw)
        return iter(()) if resumed.get("over") else self._begin_parts(loader, resumed)

    def _begin_parts(self, loader: Any, resumed: State) -> Iterator[Any]:
        raise NotImplementedError


class SeveralPositions(_Joint):
    """The positions in several loaders whose batches make one.

    Args:
        make: Makes the position of one.
    """

    def state_between_passes(self) -> State:
        """See ``Position``."""
        return {"parts": [part.part_between_passes() for part in self._parts]}

    def resume(self, state: State, loader: SeveralLoaders) -> None:
        """See ``Position``."""
        self._take(loader)
        parts = state.get("parts", [])
        if len(parts) == len(self._parts):
            self._resumed = state
            for part, found, each in zip(self._parts, parts, loader.loaders, strict=True):
                part.resume(found, each)
        else:
            _check_is_begin(state)

    def _take(self, loader: SeveralLoaders) -> None:
        last = self._parts if len(self._parts) == len(loader.loaders) else None
        lasts: Sequence[Any] = last or [None] * len(loader.loaders)
        pairs = zip(loader.loaders, lasts, strict=True)
        self._parts = [self._make(each, position) for each, position in pairs]

    def _begin_parts(self, loader: SeveralLoaders, resumed: State) -> Iterator[Any]:
        self._take(loader)
        earlier = [part.begin_part(bool(resumed)) for part in self._parts]
        parts = [Part(*each) for each in zip(loader.loaders, self._parts, strict=True)]
        return loader.combine(parts, [passes > 0 for passes in earlier])


# What SpeechBrain's LoopedLoader counts.
LOOPED = ("step", "total_steps", "total_samples")


class LoopedPosition(_Joint):
    """The position of SpeechBrain's LoopedLoader, whose pass goes on from epoch to epoch.

    Args:
        make: Makes the position of the loader that is looped.
    """

    def __init__(self, make: MakePosition) -> None:
        super().__init__(make)
        self._looped: Any = None
        # What it had counted before the batch that was fetched last.
        self._before: Any = None

    def state(self, fitted: int, after_fetch: State | None) -> State:
        """See ``Position``."""
        begun = self._fetched > fitted or self._fetching
        counts = _counts(self._before if begun else self._looped)
        return {**super().state(fitted, after_fetch), "looped": counts}

    def _state_of(self, part: Position, over: bool) -> State:
        return part.part_state()

    def state_between_passes(self) -> State:
        """See ``Position``: the loader that is looped may be in the middle of a pass."""
        parts = [part.part_state() for part in self._parts]
        return {"parts": parts, "looped": _counts(self._looped)} if parts else {}

    def resume(self, state: State, loader: Any) -> None:
        """See ``Position``."""
        if "looped" not in state:
            _check_is_begin(state)
            return
        for name, count in state["looped"].items():
            setattr(loader, name, count)
        loader.iterator = None
        self._resumed, self._looped = state, loader
        self._parts = [self._make(loader.loader)]
        self._parts[0].resume(state["parts"][0], loader.loader)

    def mark(self, records: bool) -> LoopedPosition:
        """See ``Position``."""
        marked = super().mark(records)
        assert isinstance(marked, LoopedPosition)
        marked._looped = SimpleNamespace(**_counts(self._looped))
        return marked

    def _record(self) -> None:
        super()._record()
        self._before = SimpleNamespace(**_counts(self._looped))

    def _begin_parts(self, loader: Any, resumed: State) -> Iterator[Any]:
        if self._looped is not loader:
            # A run before this one may have begun the pass.
            begun = getattr(loader.iterator, "position", None)
            self._parts = [self._make(loader.loader, begun)]
            self._looped = loader
        part = Part(loader.loader, self._parts[0])
        with _replaced(loader, part):
            iterator = iter(loader)
        return self._looped_batches(iterator, part)

    def _looped_batches(self, iterator: Iterator[Any], part: Part) -> Iterator[Any]:
        while True:
            try:
                with _replaced(self._looped, part):
                    batch = next(iterator)
            except StopIteration:
                return
            yield batch


def _counts(looped: Any) -> State:
    return {} if looped is None else {name: getattr(looped, name) for name in LOOPED}


def _replaced(looped: Any, part: Part) -> TemporaryAttributes:
    """Has a LoopedLoader begin the passes of its loader in a way that is tracked."""
    temporary = TemporaryAttributes()
    temporary.set(looped, "loader", part)
    return temporary


def _check_is_begin(state: State) -> None:
    """Warns of a position that was saved within an epoch of other loaders."""
    if state.get("batches"):
        logger.warning(
            "The checkpoint was saved within an epoch of other loaders than the run has now: "
            "that epoch begins again with their first batches."
        )
