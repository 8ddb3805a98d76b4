"""What else there is to pay: memory, beginnings, validations, many parameters.

``python -m tests.benchmarks.costs [ROUNDS]``: in ratios to SpeechBrain of one run.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from .loop import Work, brain, quiet, table

# isort: split
import speechbrain

import brain_lightning

BASES = {"SpeechBrain": speechbrain.Brain, "brain.fit": brain_lightning.Brain}
COMMANDS = {
    "import speechbrain": [
        "-c",
        "from tests.support.environment import seed_everything; import speechbrain",
    ],
    "import brain_lightning, its Brain": ["-c", "from brain_lightning import Brain"],
    "brain-lightning --help": ["-m", "brain_lightning", "--help"],
}


def seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def medians(rounds: int, actions: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Of actions that take turns."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            found[name].append(seconds(action))
    return {name: statistics.median(times) for name, times in found.items()}


def show(title: str, found: dict[str, float], unit: float = 1e3) -> None:
    base = found["SpeechBrain"]
    row = "  ".join(f"{n} {v * unit:.1f} ms ({v / base:.2f})" for n, v in found.items())
    print(f"{title:<34}{row}", flush=True)


def first_step(base: Any) -> None:
    brain(base, Work(steps=1)).fit(range(1), Work(steps=1).loader(), progressbar=False)


def validate(base: Any) -> Callable[[], None]:
    work = Work(steps=500)
    one = brain(base, work)

    def fit() -> None:
        one.fit(range(1), Work(steps=1).loader(), work.loader(), progressbar=False)

    return fit


def peak_memory(name: str, width: int = 3000) -> float:
    """Megabytes that a process of its own needed for a model of some size."""
    code = (
        "import resource; from tests.benchmarks.loop import *; quiet()\n"
        f"CONTESTANTS[{name!r}](Work(width={width}, modules=6, steps=12), False)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def tensors(count: int, rounds: int) -> None:
    work = Work(width=4, modules=count // 2, steps=max(10, 4000 // count))
    names = ["SpeechBrain", "PyTorch", "brain.fit"]
    found = table(work, rounds, names, bars=(False,))
    times = {name: found[name, False] / 1e6 for name in names}
    show(f"a step with {count} parameter tensors", times)


def main(rounds: int) -> None:
    quiet()
    for name, command in COMMANDS.items():
        run = [sys.executable, *command]
        took = medians(
            rounds, {name: lambda run=run: subprocess.run(run, capture_output=True)}
        )
        print(f"{name:<34}{took[name]:.2f} s", flush=True)
    runs = {name: lambda base=base: first_step(base) for name, base in BASES.items()}
    show("fit, to its first step and end", medians(rounds, runs))
    show(
        "validation of 500 batches",
        medians(rounds, {n: validate(b) for n, b in BASES.items()}),
    )
    memory = {name: peak_memory(name) for name in ("SpeechBrain", "brain.fit")}
    ratio = memory["brain.fit"] / memory["SpeechBrain"]
    print(f"{'peak memory':<34}{memory} MB, ratio {ratio:.3f}", flush=True)
    for count in (10, 100, 1000, 10_000):
        tensors(count, rounds)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
