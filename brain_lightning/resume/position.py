"""The base class of positions in data, and the positions of combined loaders."""

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
    """A position in data: how far a pass over the data is, and how it is resumed.

    If several loaders are iterated together, each has its own position, which is a part of a
    combined position.

    Attributes:
        fitted: Number of batches of this pass that have been fitted.
        records_fetches: Whether to record the state before each batch is fetched. It is
            needed if a checkpoint may be saved between fetching a batch and fitting it.
        passes: For a part: number of passes over this loader that have started in the
            current pass over all loaders.
    """

    def __init__(self) -> None:
        self.fitted = 0
        self.records_fetches = False
        self.passes = 0
        self._fetched = 0
        # Whether the next batch is being fetched, or fetching it has failed.
        self._fetching = False
        # Whether the pass has ended. A stream may restart if it is iterated after its end.
        self._over = False
        self._before_fetch: State | None = None
        self._resumed: State | None = None

    def state(self, fitted: int, after_fetch: State | None) -> State:
        """Returns the state to resume from within a pass.

        Args:
            fitted: Number of batches after which to resume.
            after_fetch: Random state with which to fit the next batch, if it was already
                fetched. None to use the random state after fetching it.
        """
        raise NotImplementedError

    def state_between_passes(self) -> State:
        """Returns the state to resume from before the next pass."""
        raise NotImplementedError

    def resume(self, state: State, loader: Any) -> None:
        """Restores a state. It takes effect in the next pass.

        Args:
            state: Result of ``state`` or ``state_between_passes``. It is adapted in place if
                the loader now makes other batches than when the state was saved.
            loader: Loader that ``fit`` got. ``set_epoch`` of its sampler is called later.
        """
        raise NotImplementedError

    def count(self) -> None:
        """Counts a fitted batch."""
        self.fitted += 1

    def can_fetch_again(self) -> bool:
        """Whether fetching the last batch again would return the same batch."""
        return self._before_fetch is not None

    def batches(self, loader: Any) -> Iterator[Any]:
        """Yields one pass over the data from the resumed position on.

        The pass starts when the first batch is requested.

        Args:
            loader: Loader that ``fit`` got.

        Yields:
            The batches.
        """
        yield from self.begin(loader)

    def begin(self, loader: Any) -> Iterator[Any]:
        """Starts the pass of ``batches`` immediately, and returns its iterator.

        Args:
            loader: Loader that ``fit`` got.
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
        """Records the state that fetching the next batch will change."""
        raise NotImplementedError

    def _fetch(self, iterator: Iterator[Any]) -> Any:
        raise NotImplementedError

    # ------------------------------------------------- parts of a combined position

    def part_state(self) -> State:
        """Returns the state of a part. The combined position saves the random state."""
        if self._resumed is not None:
            return self._resumed
        if not self.passes or self._over:
            over = self.passes > 0
            return {**self.state_between_passes(), "passes": self.passes, "over": over}
        state = self.state(self._fetched, None)
        before_fetch = {n: v for n, v in state["draw"].items() if n != "random"}
        return {**state, "draw": before_fetch, "passes": self.passes}

    def part_between_passes(self) -> State:
        """Returns the state of a part before the next pass over all loaders."""
        return {**self.state_between_passes(), "passes": 0, "over": False}

    def begin_part(self, resumes: bool) -> int:
        """Prepares a part for a pass over all loaders. Called when this pass starts.

        Args:
            resumes: Whether this pass is the resumed one.

        Returns:
            Number of passes over this loader that were over in the resumed pass.
        """
        if self._resumed is not None and not resumes:
            self._resumed = {**self._resumed, "passes": 0, "over": False}
        self.passes = max(0, (self._resumed or {}).get("passes", 0) - 1)
        return self.passes

    def mark(self, records: bool) -> Position:
        """Returns a cheap copy of a part at this moment, for a later ``part_state``.

        Args:
            records: Whether to also save the state of the loader that fetching changes.
        """
        raise NotImplementedError


class MakePosition(Protocol):
    """Type of ``data_position.position_in``."""

    def __call__(self, loader: Any, last: Position | None = None) -> Position:
        """See ``data_position.position_in``.

        Args:
            loader: The loader.
            last: Position in the data of the previous pass.
        """


@dataclass
class Part:
    """One of several loaders that are iterated together. It counts its passes.

    Attributes:
        loader: The loader.
        position: Position in the data of the loader.
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
        position: Position in the data of the loader.
        batches: Iterator over the batches.
    """

    position: Position
    batches: Iterator[Any]

    def __next__(self) -> Any:
        return next(self.batches)


class _CombinedPosition(Position):
    """The position of several loaders that are iterated together.

    Each loader may fetch when one combined batch is fetched. Therefore the positions of all
    loaders are copied before each combined batch.
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
            # This position is itself a part: the outer position records the state.
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
        """Counts the fetched batches of each part as fitted, for loaders that save it."""
        for part in self._parts:
            part.fitted = part._fetched
            if isinstance(part, _CombinedPosition):
                part._count_parts()

    def _begin(self, loader: Any, resumed: State) -> Iterator[Any]:
        self._before_fetch, self._fetching = None, False
        self.fitted = self._fetched = resumed.get("batches", 0)
        random = resumed.get("draw", {}).get("random")
        if random is not None:
            set_random_state(random)
        return iter(()) if resumed.get("over") else self._begin_parts(loader, resumed)

    def _begin_parts(self, loader: Any, resumed: State) -> Iterator[Any]:
        raise NotImplementedError


class SeveralPositions(_CombinedPosition):
    """The position of several loaders whose batches are combined into one.

    Args:
        make: Creates the position of one loader.
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
            _warn_if_within_epoch(state)

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


# Attributes that SpeechBrain's LoopedLoader counts.
LOOPED = ("step", "total_steps", "total_samples")


class LoopedPosition(_CombinedPosition):
    """The position of SpeechBrain's LoopedLoader, whose passes continue over epochs.

    Args:
        make: Creates the position of the inner loader.
    """

    def __init__(self, make: MakePosition) -> None:
        super().__init__(make)
        self._looped: Any = None
        # Its counts before the last batch was fetched.
        self._before: Any = None

    def state(self, fitted: int, after_fetch: State | None) -> State:
        """See ``Position``."""
        begun = self._fetched > fitted or self._fetching
        counts = _counts(self._before if begun else self._looped)
        return {**super().state(fitted, after_fetch), "looped": counts}

    def _state_of(self, part: Position, over: bool) -> State:
        return part.part_state()

    def state_between_passes(self) -> State:
        """See ``Position``. The inner loader may be in the middle of a pass."""
        parts = [part.part_state() for part in self._parts]
        return {"parts": parts, "looped": _counts(self._looped)} if parts else {}

    def resume(self, state: State, loader: Any) -> None:
        """See ``Position``."""
        if "looped" not in state:
            _warn_if_within_epoch(state)
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
            # A previous run may have started the pass.
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
    """Replaces the inner loader of a LoopedLoader temporarily by a tracked loader."""
    temporary = TemporaryAttributes()
    temporary.set(looped, "loader", part)
    return temporary


def _warn_if_within_epoch(state: State) -> None:
    """Warns about a position that was saved within an epoch of other loaders."""
    if state.get("batches"):
        logger.warning(
            "The checkpoint was saved within an epoch with other loaders than the run has "
            "now. The epoch starts again from the first batches of the loaders."
        )
