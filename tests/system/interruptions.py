"""Interrupts trainings at each event, resumes them, and compares with one left alone.

``python -m tests.system.interruptions [REGEX] [--processes N]`` prints a row for each setting
and way of interruption, and then what failed; "by numbers" are failures in more than the order
of events. A point is an event of the run that was left
alone; the resumed run is interrupted once more at a later one. ``--at POINT`` runs a single
point and prints all that differs; ``--every K`` leaves points out. A test does a few.
"""

from __future__ import annotations

import argparse
import collections
import functools
import logging
import multiprocessing
import random
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.support import environment  # noqa: F401  It makes SpeechBrain importable.
from tests.support.interrupted import WAYS, Outcome, Setting, run
from tests.support.traces import Trace, different

FROM_FILES = ("error", "error-last", "trainer")
SETTINGS = (
    Setting("plain", norm=False),
    Setting("norm"),
    Setting("accumulation", accumulation=3),
    Setting("two", optimizers=2, norm=False),
    Setting("two-accumulation", accumulation=3, optimizers=2),
    Setting("workers", workers=True),
    Setting("workers-accumulation", workers=True, accumulation=3),
    Setting("items", data="items"),
    Setting("items-workers", data="items", workers=True, batches=6, accumulation=4),
    Setting("loader", data="loader"),
    Setting("loader-accumulation", data="loader", accumulation=3, batches=6),
    Setting("gan", optimizers=2, own_fit_batch=True),
    Setting(
        "gan-workers", optimizers=2, own_fit_batch=True, workers=True, listens="batches",
    ),
    Setting("lean", listens="none"),
    Setting("lean-accumulation", listens="none", accumulation=3, optimizers=2),
    Setting("batches", listens="batches", accumulation=3),
    Setting("callbacks", callbacks=("EarlyStopping", "ModelCheckpoint")),
    Setting("callbacks-lean", listens="none", callbacks=("EarlyStopping", "ModelCheckpoint")),
    Setting("stops", callbacks=("stops", "ModelCheckpoint")),
    Setting("scheduler", callbacks=("GradientAccumulationScheduler",)),
    Setting("halves", batches=6, arguments={"val_check_interval": 0.5}),
    Setting(
        "halves-accumulation", batches=6, accumulation=4,
        callbacks=("EarlyStopping", "ModelCheckpoint"), arguments={"val_check_interval": 0.5},
    ),
    Setting("average", callbacks=("EMAWeightAveraging",), ways=FROM_FILES),
    Setting("backbone", callbacks=("BackboneFinetuning",)),
)  # fmt: skip


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


@functools.cache
def left_alone(setting: Setting, way: str) -> tuple[Trace, Outcome]:
    """The run that nothing interrupts."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(setting, way, Path(folder))
    return Trace(outcome.heard), outcome


def check_point(
    setting: Setting, way: str, point: int, again: int | None = None, raises: bool = False
) -> Failure | None:
    """Interrupts a run at an event, and once more at a later one.

    Args:
        setting: How to train.
        way: How to interrupt.
        point: The number of the event.
        again: That of the later one; by default one that follows from the point, and the
            number of events for none.
        raises: Whether an error in a resumed run is raised rather than reported.
    """
    trace, _ = left_alone(setting, way)
    later = random.Random(point).randrange(point + 1, len(trace) + 1)  # noqa: S311
    again = later if again is None else again
    problems = _problems(setting, way, point, again, raises)
    if problems and again < len(trace):
        alone = _problems(setting, way, point, len(trace), raises)
        late = [f"resumed twice, at {again}: {problem}" for problem in problems]
        problems = alone or late
    return Failure(point, str(trace.events[point]), tuple(problems)) if problems else None


def _problems(setting: Setting, way: str, point: int, again: int, raises: bool) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            return _differences(setting, way, Path(folder), (point, again))
        except Exception as error:
            if raises:
                raise
            line = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(line.filename).name}:{line.name}"
            return [f"crash: {type(error).__name__} in {where}: {error}"[:200]]


def _differences(
    setting: Setting, way: str, folder: Path, points: tuple[int, int]
) -> list[str]:
    """Interrupts at these points, ends in peace, and compares each run."""
    trace, alone = left_alone(setting, way)
    begins: set[int] | range = {0}
    problems: list[str | None] = []
    for point in points:
        if point >= len(trace):
            break
        outcome = run(setting, way, folder, trace.events[point].key)
        problems.append(trace.differs(outcome.heard, begins, point + 1))
        if not outcome.was_cut:
            return [*filter(None, problems), f"never came to {trace.events[point]}"]
        begins = trace.may_begin(point, way.startswith("error"))
        if way == "error-last":
            # It saves nothing where there was no step since the last time that it saved.
            begins = range(max(begins) + 1)
    outcome = run(setting, way, folder)
    problems.append(trace.differs(outcome.heard, begins))
    return [*filter(None, problems), *different(outcome.state, alone.state)]


# --------------------------------------------------------------------------- the script


def quiet() -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def check_points(
    setting: Setting, way: str, points: range, raises: bool = False
) -> tuple[int, list[Failure]]:
    """How many of the points there are, and which failed."""
    trace, _ = left_alone(setting, way)
    points = points[: len(range(points.start, len(trace), points.step))]
    found = [check_point(setting, way, point, raises=raises) for point in points]
    return len(found), [failure for failure in found if failure is not None]


def check_all(
    rows: list[tuple[Setting, str]], every: int, processes: int
) -> Iterator[tuple[Setting, str, int, list[Failure]]]:
    """All points of the rows, in several processes."""
    context = multiprocessing.get_context("fork")
    parts = 4 * processes
    with ProcessPoolExecutor(processes, context, initializer=quiet) as pool:
        futures = [
            [
                pool.submit(
                    _check_part, setting.name, way, range(part * every, 10_000, parts * every)
                )
                for part in range(parts)
            ]
            for setting, way in rows
        ]
        for (setting, way), row in zip(rows, futures, strict=True):
            results = [future.result() for future in row]
            failures = [failure for _, part in results for failure in part]
            failures.sort(key=lambda failure: failure.point)
            yield setting, way, sum(count for count, _ in results), failures


def _check_part(name: str, way: str, points: range) -> tuple[int, list[Failure]]:
    (setting,) = (setting for setting in SETTINGS if setting.name == name)
    try:
        return check_points(setting, way, points)
    except Exception as error:  # noqa: BLE001  reported as one failure of the row
        return 1, [Failure(-1, "the run that was left alone", (f"crash: {error!r}"[:300],))]


def describe(failures: list[Failure], limit: int | None) -> Iterator[str]:
    """A line for each kind of failure: at what kind of event, and the first difference."""
    kinds: dict[tuple[str, str], list[Failure]] = collections.defaultdict(list)
    for failure in failures:
        what = re.sub(r"[-\d.e]*\d[\d.e]*", "N", failure.problems[0])
        kinds[failure.event.split(" (")[0], what if limit else str(failure)].append(failure)
    for (event, _), alike in kinds.items():
        first = alike[0]
        points = " ".join(str(failure.point) for failure in alike[:limit])
        yield f"  {len(alike):>3} {event} ({points}): {first.problems[0]}"
        rest = [problem for problem in first.by_numbers if problem != first.problems[0]]
        if rest:
            yield f"      {rest[0]} (and {len(rest) - 1} more)"


def show_point(setting: Setting, way: str, point: int, again: int | None) -> int:
    """Runs one point and prints all that differs, or raises what it raises."""
    trace, _ = left_alone(setting, way)
    print(f"{setting.name} {way}: {len(trace)} events; point {point}: {trace.events[point]}")
    failure = check_point(setting, way, point, again, raises=True)
    for problem in failure.problems if failure else ["equal"]:
        print(f"  {problem}")
    return 1 if failure else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="?", default="", help="a regex of names")
    parser.add_argument("--way", default="", help=f"a regex, of {', '.join(WAYS)}")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, help="leave points out")
    parser.add_argument("--at", type=int, help="one point")
    parser.add_argument("--again", type=int, help="where to interrupt again; -1: nowhere")
    parser.add_argument("--all", action="store_true", help="print each failure")
    parser.add_argument(
        "--trace", action="store_true", help="print the events, and run no point"
    )
    arguments = parser.parse_args()
    quiet()
    rows = [
        (setting, way)
        for setting in SETTINGS
        if re.search(arguments.settings, setting.name)
        for way in setting.ways
        if re.search(arguments.way, way)
    ]
    if arguments.trace:
        for index, event in enumerate(left_alone(*rows[0])[0].events):
            print(index, event, *event.told)
        return 0
    if arguments.at is not None:
        again = 10_000 if arguments.again == -1 else arguments.again
        return max([show_point(*row, arguments.at, again) for row in rows])
    return print_table(
        rows, arguments.every, arguments.processes, None if arguments.all else 5
    )


def print_table(
    rows: list[tuple[Setting, str]], every: int, processes: int, limit: int | None
) -> int:
    print(f"{'setting':<22}{'way':<20}{'points':>7}{'failures':>10}{'by numbers':>12}")
    failed = []
    for setting, way, points, failures in check_all(rows, every, processes):
        numbers = sum(bool(failure.by_numbers) for failure in failures)
        print(
            f"{setting.name:<22}{way:<20}{points:>7}{len(failures):>10}{numbers:>12}",
            flush=True,
        )
        failed += [(setting, way, failures)] if failures else []
    for setting, way, failures in failed:
        print(f"\n{setting.name} {way}: {len(failures)} failures")
        print(*describe(failures, limit), sep="\n", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
