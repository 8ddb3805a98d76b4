"""Interrupts a run at one of its events, resumes it, and compares it with one left alone."""

from __future__ import annotations

import functools
import itertools
import random
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from .interrupted import Outcome, Setting, run
from .traces import Trace, different

NEVER = 1_000_000


@dataclass(frozen=True)
class Failure:
    """A point from which a run did not go on as it should.

    Attributes:
        point: The number of the event.
        event: The event at which the run was interrupted.
        problems: What differs; in the order of events first, then in what was learned.
    """

    point: int
    event: str
    problems: tuple[str, ...]

    @property
    def by_numbers(self) -> list[str]:
        """All but the order of events."""
        return [p for p in self.problems if not p.startswith(("begins", "order"))]


class Points:
    """The points at which a run can be interrupted: the events of the one left alone.

    Args:
        setting: How to train.
        way: How to interrupt it, and what to resume from.
        folder: Makes a folder, for the files of a run.
        raises: Whether an error in a resumed run is raised rather than reported.
    """

    def __init__(
        self,
        setting: Setting,
        way: str,
        folder: Callable[[], AbstractContextManager[str]] = tempfile.TemporaryDirectory,
        raises: bool = False,
    ) -> None:
        self.setting, self.way, self.folder, self.raises = setting, way, folder, raises

    @functools.cached_property
    def alone(self) -> tuple[Trace, Outcome]:
        """The run that nothing interrupts."""
        with self.folder() as folder:
            outcome = run(self.setting, self.way, Path(folder))
        return Trace(outcome.heard), outcome

    def check_every(self, start: int, step: int) -> tuple[int, list[Failure]]:
        """How many points there are, of every so many, and which failed."""
        points = range(start, len(self.alone[0]), step)
        failures = filter(None, map(self.check, points))
        return len(points), list(failures)

    def check(self, point: int, again: int | None = None) -> Failure | None:
        """Interrupts a run at a point, and once more at a later one.

        Args:
            point: The number of the event.
            again: That of the later one; by default one that follows from the point.
        """
        trace, _ = self.alone
        later = random.Random(point).randrange(point + 1, len(trace) + 1)  # noqa: S311
        again = later if again is None else again
        problems = self._problems(point, again)
        if problems and again < len(trace) and self.setting.processes == 1:
            once = self._problems(point, NEVER)
            problems = once or [*problems, f"only where resumed twice, at {again}"]
        return Failure(point, str(trace.events[point]), tuple(problems)) if problems else None

    def _problems(self, *points: int) -> list[str]:
        with self.folder() as folder:
            try:
                return self._differences(Path(folder), points)
            except Exception as error:
                if self.raises:
                    raise
                line = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(line.filename).name}:{line.name}"
                return [f"crash: {type(error).__name__} in {where}: {error}"[:200]]

    def _differences(self, folder: Path, points: tuple[int, ...]) -> list[str]:
        """Interrupts at these points, ends in peace, and compares each run."""
        trace, alone = self.alone
        begins: set[int] | range = {0}
        problems: list[str | None] = []
        for point in points:
            if point >= len(trace):
                break
            outcome = run(self.setting, self.way, folder, trace.events[point].key)
            problems.append(trace.differs(outcome.heard, begins, point + 1))
            if not outcome.was_cut:
                return [*filter(None, problems), f"never came to {trace.events[point]}"]
            begins = trace.may_begin(point, self.way.startswith("error"))
            if self.way == "error-last":
                # It saves nothing where there was no step since the last time it saved.
                begins = range(max(begins) + 1)
        outcome = run(self.setting, self.way, folder)
        problems.append(trace.differs(outcome.heard, begins))
        return [*filter(None, problems), *different(outcome.state, alone.state)]


def numbered_folders(parent: Path) -> Callable[[], AbstractContextManager[str]]:
    """Folders that several processes which do the same name alike."""
    numbers = itertools.count()

    @contextmanager
    def folder() -> Iterator[str]:
        path = parent / str(next(numbers))
        path.mkdir(exist_ok=True)
        yield str(path)

    return folder
