"""Interrupts trainings at each event, resumes them, and compares with one left alone.

``python -m tests.system.interruptions [REGEX] [--processes N]`` prints a row for each setting
and way of interruption, and then what failed; "by numbers" are failures in more than the
order of events. A point is an event of the run that was left alone; the resumed run is
interrupted once more at a later one. ``--every K`` leaves points out; ``--trace`` numbers the
events; ``--at POINT`` runs a single point and prints all that differs. A test does a few.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, replace
from pathlib import Path

import torch

from tests.support import environment  # noqa: F401  It makes SpeechBrain importable.
from tests.support.interrupted import WAYS, Setting
from tests.support.interruption_points import NEVER, Failure, Points, numbered_folders
from tests.support.processes import TORCHRUN, run_python

FROM_FILES = ("error", "error-last", "trainer")
WITHIN = ("ours-within", "speechbrain-within")
MONITORS = ("EarlyStopping", "ModelCheckpoint")
HALVES = {"val_check_interval": 0.5}
SETTINGS = {
    setting.name: setting
    for setting in (
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
            "gan-workers", optimizers=2, own_fit_batch=True, workers=True, listens="batches"
        ),
        Setting("gan-lean", optimizers=2, own_fit_batch=True, listens="none"),
        Setting("lean", listens="none"),
        Setting("lean-accumulation", listens="none", accumulation=3, optimizers=2),
        Setting("batches", listens="batches", accumulation=3),
        Setting("callbacks", callbacks=MONITORS),
        Setting("callbacks-lean", listens="none", callbacks=MONITORS),
        Setting("stops", callbacks=("stops", "ModelCheckpoint")),
        Setting("scheduler", callbacks=("GradientAccumulationScheduler",)),
        Setting("halves", batches=6, arguments=HALVES),
        Setting(
            "halves-accumulation", batches=6, accumulation=4, callbacks=MONITORS,
            arguments=HALVES,
        ),
        Setting("average", callbacks=("EMAWeightAveraging",), ways=FROM_FILES),
        Setting("backbone", callbacks=("BackboneFinetuning",)),
        Setting("around", loop="around", accumulation=3, callbacks=MONITORS),
        Setting("around-halves", loop="around", batches=6, arguments=HALVES),
        Setting("own-loop", loop="own", accumulation=3, ways=WITHIN),
        Setting("own-loop-callbacks", loop="own", callbacks=MONITORS, ways=WITHIN),
        Setting("own-loop-lean", loop="own", listens="none", data="items", ways=WITHIN),
        Setting("processes", processes=2, accumulation=3, every=7),
        Setting("processes-workers", processes=2, workers=True, optimizers=2, every=13),
    )
}  # fmt: skip
Rows = list[tuple[Setting, str]]


def quiet() -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def check_all(
    rows: Rows, every: int, processes: int
) -> Iterator[tuple[Setting, str, int, list[Failure]]]:
    """All points of the rows, in several processes."""
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, initializer=quiet) as pool:
        futures = []
        for setting, way in rows:
            step = every * setting.every
            parts = 4 * processes if setting.processes == 1 else 1
            function = check_part if setting.processes == 1 else check_with_ranks
            futures.append(
                [
                    pool.submit(function, setting.name, way, part * step, parts * step)
                    for part in range(parts)
                ]
            )
        for (setting, way), row in zip(rows, futures, strict=True):
            results = [future.result() for future in row]
            failures = [failure for _, part in results for failure in part]
            failures.sort(key=lambda failure: failure.point)
            yield setting, way, sum(count for count, _ in results), failures


def check_part(name: str, way: str, start: int, step: int) -> tuple[int, list[Failure]]:
    """Some points of a row; what fails without an interruption fails as one point."""
    try:
        return Points(SETTINGS[name], way).check_every(start, step)
    except Exception as error:  # noqa: BLE001  reported
        return 1, [Failure(-1, "none (left alone)", (f"crash: {error!r}"[:300],))]


# ------------------------------------------------------------------- several processes


def check_with_ranks(name: str, way: str, start: int, step: int) -> tuple[int, list[Failure]]:
    """The same by two processes which do the same."""
    with tempfile.TemporaryDirectory() as folder:
        words = (name, "--way", way, "--ranks", folder, str(start), str(step))
        try:
            done = run_python(*TORCHRUN, "-m", "tests.system.interruptions", *words)
        except subprocess.TimeoutExpired:
            return 1, [Failure(-1, "any", ("crash: the processes wait for each other",))]
        files = [Path(folder, f"rank{rank}.json") for rank in range(2)]
        if done.returncode or not all(file.exists() for file in files):
            lines = re.findall(r"^.*(?:Error|point).*$", done.stderr, re.MULTILINE)
            return 1, [Failure(-1, "any", ("crash: " + " | ".join(lines)[-300:],))]
        found = [json.loads(file.read_text()) for file in files]
    failures = {
        point: Failure(point, event, tuple(problems))
        for _, failed in reversed(found)
        for point, event, problems in failed
    }
    return found[0][0], list(failures.values())


def be_a_rank(name: str, way: str, parent: Path, start: int, step: int) -> None:
    """One of the processes: a crash ends all of them."""
    timeout = datetime.timedelta(seconds=30)
    torch.distributed.init_process_group("gloo", timeout=timeout)
    folders = numbered_folders(parent)
    points = Points(SETTINGS[name], way, folders, raises=True)
    found: list[Failure | None] = []
    for point in range(start, len(points.alone[0]), step):
        print("point", point, file=sys.stderr)
        found.append(points.check(point))
    result = [len(found), [astuple(failure) for failure in found if failure is not None]]
    (parent / f"rank{os.environ['RANK']}.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    # gloo's threads may abort while the interpreter ends.
    os._exit(0)


# --------------------------------------------------------------------------- the script


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
    if setting.processes > 1:
        _, failures = check_with_ranks(setting.name, way, point, NEVER)
        print(*(failures if failures else ["equal"]), sep="\n")
        return 1 if failures else 0
    points = Points(setting, way, raises=True)
    trace, _ = points.alone
    print(f"{setting.name} {way}: {len(trace)} events; point {point}: {trace.events[point]}")
    failure = points.check(point, again)
    for problem in failure.problems if failure else ["equal"]:
        print(f"  {problem}")
    return 1 if failure else 0


def show_trace(setting: Setting, way: str) -> int:
    alone, _ = Points(replace(setting, processes=1), way).alone
    for index, event in enumerate(alone.events):
        print(index, event, *event.told)
    return 0


def print_table(rows: Rows, every: int, processes: int, limit: int | None) -> int:
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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="?", default="", help="a regex of names")
    parser.add_argument("--way", default="", help=f"a regex, of {', '.join(WAYS)}")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, help="leave points out")
    parser.add_argument("--at", type=int, help="one point")
    parser.add_argument("--again", type=int, help="where to interrupt again; -1: nowhere")
    parser.add_argument("--all", action="store_true", help="print each failure")
    parser.add_argument("--trace", action="store_true", help="print the events, by number")
    parser.add_argument("--ranks", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    quiet()
    if arguments.ranks:
        folder, start, step = arguments.ranks
        be_a_rank(arguments.settings, arguments.way, Path(folder), int(start), int(step))
    rows = [
        (setting, way)
        for setting in SETTINGS.values()
        if re.search(arguments.settings, setting.name)
        for way in setting.ways
        if re.search(arguments.way, way)
    ]
    if arguments.trace:
        return show_trace(*rows[0])
    if arguments.at is not None:
        again = NEVER if arguments.again == -1 else arguments.again
        return max([show_point(*row, arguments.at, again) for row in rows])
    limit = None if arguments.all else 5
    return print_table(rows, arguments.every, arguments.processes, limit)


if __name__ == "__main__":
    sys.exit(main())
