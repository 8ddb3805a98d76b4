"""What else there is to pay: beginnings, validations, memory, many parameters.

``python -m tests.benchmarks.costs [ROUNDS] [--json [FILE]]``
"""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from typing import Any

import brain_lightning

from .contestants import CONTESTANTS, Work, brain, speechbrain
from .measure import Seconds, interleaved, quiet, seconds
from .report import Figure, Report, compared, parser

BASES = {"SpeechBrain": speechbrain.Brain, "brain.fit": brain_lightning.Brain}
COMMANDS = {
    "import speechbrain": [
        "-c",
        "from tests.support.environment import seed_everything; import speechbrain",
    ],
    "import brain_lightning, its Brain": ["-c", "from brain_lightning import Brain"],
    "brain-lightning --help": ["-m", "brain_lightning", "--help"],
}


def commands(rounds: int) -> dict[str, Figure]:
    """Processes, from their start to their end."""
    actions = {
        name: partial(
            seconds, partial(subprocess.run, [sys.executable, *words], capture_output=True)
        )
        for name, words in COMMANDS.items()
    }
    return {n: Figure(times, "s") for n, times in interleaved(rounds, actions).items()}


def fit_starts(rounds: int) -> dict[str, Figure]:
    """From ``fit`` to the forward pass of the first batch."""
    return _compared(rounds, {name: partial(_start, base) for name, base in BASES.items()})


def _start(base: Any) -> float:
    one = brain(base, Work(steps=1))
    begun = []
    one.modules["m0"].register_forward_pre_hook(lambda *_: begun.append(time.perf_counter()))
    loader = Work(steps=1).loader()
    started = time.perf_counter()
    one.fit(range(1), loader, progressbar=False)
    return begun[0] - started


def whole_fits(rounds: int) -> dict[str, Figure]:
    """A Brain, and its fit of one batch."""
    fits = {name: partial(CONTESTANTS[name], Work(steps=1), False) for name in BASES}
    return _compared(rounds, {name: partial(seconds, fit) for name, fit in fits.items()})


def valid_batches(rounds: int, count: int = 500) -> dict[str, Figure]:
    """A batch of a validation, without the start of the fit."""
    actions = {n: partial(_batches, n, Work(), count, valid=True) for n in BASES}
    return _compared(rounds, actions, 1e6 / count, "us")


def tensors(
    count: int, rounds: int, names: tuple[str, ...] = ("SpeechBrain", "PyTorch", "brain.fit")
) -> dict[str, Figure]:
    """A step with so many parameter tensors, without the start of the fit."""
    work, batches = Work(width=4, modules=count // 2), max(8, 4000 // count)
    actions = {name: partial(_batches, name, work, batches) for name in names}
    return _compared(rounds, actions, 1e6 / batches, "us")


def _batches(name: str, work: Work, count: int, valid: bool = False) -> float:
    watch = Seconds()
    CONTESTANTS[name](work.measured(count, watch, warm=2, valid=valid), False)
    return watch.taken


def _compared(
    rounds: int, actions: dict[str, Any], scale: float = 1e3, unit: str = "ms"
) -> dict[str, Figure]:
    # What is only made once is made before.
    interleaved(1, actions)
    found = interleaved(rounds, actions)
    return compared({n: [s * scale for s in times] for n, times in found.items()}, unit)


def peak_memory(name: str, width: int = 3000) -> float:
    """Mebibytes that a process of its own needed for a model of some size."""
    code = (
        "import resource; from tests.benchmarks.contestants import CONTESTANTS, Work\n"
        "from tests.benchmarks.measure import quiet\n"
        f"work = Work(width={width}, modules=6, steps=12)\n"
        f"with quiet(): CONTESTANTS[{name!r}](work, False)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    options = parser(__doc__).parse_args()
    rounds, report = options.rounds, Report(options)
    with quiet():
        found = {name: {"whole": figure} for name, figure in commands(rounds).items()}
        report.table("Processes", found)
        rows = {
            "a fit, to its first batch": fit_starts(rounds),
            "a Brain and its fit of one batch": whole_fits(rounds),
            "a batch of a validation": valid_batches(rounds),
            "peak memory": compared({name: [peak_memory(name)] for name in BASES}, "MiB"),
        }
        for count in (10, 100, 1000, 10_000):
            rows[f"a step with {count} parameter tensors"] = tensors(count, rounds)
        report.table("Costs", rows)
    report.end()


if __name__ == "__main__":
    main()
