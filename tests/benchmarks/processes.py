"""What a step costs where two processes train one Brain: its time, and collectives a batch.

``python -m tests.benchmarks.processes [ROUNDS] [--json [FILE]]``. Both sides run under one
torchrun, with gloo, and take turns. Counted is each collective that the process group gets;
DDP's, which are within the backward pass, apart.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import brain_lightning
from tests.support.collectives import Collectives

from .contestants import Work, fit_of, speechbrain
from .measure import Seconds, end_process, interleaved, quiet
from .report import Figure, Report, parser

NAME = "tests.benchmarks.processes"
STEPS = 200
SAVES = "interval saves"
WORK = Work(width=32, run_opts={"distributed_backend": "gloo", "distributed_launch": True})


def kinds(folder: str) -> dict[str, Callable[[Work], None]]:
    """Who takes part, with interval saves and without."""
    trainings = {
        "SpeechBrain": fit_of(speechbrain.Brain),
        "brain.fit": fit_of(brain_lightning.Brain),
        "own fit_batch": fit_of(brain_lightning.Brain, by_hand=True),
    }
    found: dict[str, Callable[[Work], None]] = {}
    for name, fit in trainings.items():
        found[name] = lambda work, fit=fit: fit(work, False)
        found[f"{name}, {SAVES}"] = lambda work, fit=fit: fit(_saving(work, folder), False)
    return found


def _saving(work: Work, folder: str) -> Work:
    """None is due while it is measured: what is paid is to ask whether one is."""

    def checkpointer(base: Any, layers: dict[str, Any]) -> Any:
        from speechbrain.utils.checkpoints import Checkpointer

        ours = base is brain_lightning.Brain
        kind = brain_lightning.Checkpointer if ours else Checkpointer
        return kind(tempfile.mkdtemp(dir=folder), layers)

    run_opts = {**work.run_opts, "ckpt_interval_minutes": 15}
    return replace(work, run_opts=run_opts, checkpointer=checkpointer)


def microseconds(fit: Callable[[Work], None]) -> float:
    """A step, without the start of the fit."""
    watch = Seconds()
    fit(WORK.measured(STEPS, watch))
    return watch.taken / STEPS * 1e6


def collectives(fit: Callable[[Work], None], steps: int = 20) -> tuple[float, float]:
    """How many a batch makes, and how many of them are DDP's."""
    counter = Collectives()
    fit(WORK.measured(steps, counter))
    return counter.count / steps, counter.gradients / steps


def measure(rounds: int, file: Path) -> None:
    """In one of the processes; the first one writes what it has seen."""
    from speechbrain.utils.distributed import ddp_init_group

    ddp_init_group({"distributed_launch": True, "distributed_backend": "gloo"})
    trainings = kinds(str(file.parent))
    counts = interleaved(1, {n: partial(collectives, fit) for n, fit in trainings.items()})
    times = interleaved(rounds, {n: partial(microseconds, f) for n, f in trainings.items()})
    if torch.distributed.get_rank() == 0:
        file.write_text(json.dumps({"counts": counts, "times": times}))
    end_process()


def measured(rounds: int) -> dict[str, dict[str, Figure]]:
    """The rows of the table, from two processes; a step against SpeechBrain's of its kind."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "figures.json")
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        subprocess.run(
            [sys.executable, *torchrun, "-m", NAME, str(rounds), "--to", str(file)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=300,
        )  # fmt: skip
        found = json.loads(file.read_text())
    rows = {}
    for name, times in found["times"].items():
        theirs = f"SpeechBrain, {SAVES}" if name.endswith(SAVES) else "SpeechBrain"
        count, gradients = found["counts"][name][0]
        rows[name] = {
            "a step": Figure(times, "us", found["times"][theirs]),
            "collectives a batch": Figure([count], "collectives"),
            "of gradients": Figure([gradients], "collectives"),
        }
    return rows


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--to", type=Path, help="where one of the two processes writes")
    options = made.parse_args()
    if options.to:
        with quiet():
            measure(options.rounds, options.to)
        return
    report = Report(options)
    report.table("Two processes", measured(options.rounds))
    report.end()


if __name__ == "__main__":
    main()
