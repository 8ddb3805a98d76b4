"""How long training stands still for a save, against SpeechBrain's, and what memory it takes.

``python -m tests.benchmarks.checkpoint_stall [ROUNDS] [--megabytes N] [--json [FILE]]``. Every
save keeps one checkpoint, as recipes do. Peak memory is of a process for each.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import brain_lightning

from .contestants import speechbrain
from .measure import Seconds, interleaved, quiet
from .report import Figure, Report, compared, parser

KINDS = (*(["SpeechBrain"] if speechbrain else []), "synchronous", "background")
NAME = "tests.benchmarks.checkpoint_stall"


def state(megabytes: int, device: str = "cpu") -> dict[str, Any]:
    """A model with Adam: a third of the numbers each are weights and the two averages."""
    columns = 1024
    outputs = megabytes * 2**20 // 4 // 3 // columns
    model = torch.nn.Linear(columns, outputs, bias=False, device=device)
    optimizer = torch.optim.Adam(model.parameters())
    model.weight.grad = torch.randn_like(model.weight)
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def checkpointer(kind: str, folder: str, objects: dict[str, Any]) -> Any:
    if kind == "SpeechBrain":
        from speechbrain.utils.checkpoints import Checkpointer

        return Checkpointer(folder, objects)
    ours = brain_lightning.Checkpointer(folder, objects)
    ours.async_save = kind == "background"
    return ours


def stalls(
    megabytes: int, rounds: int, folder: Path, device: str = "cpu"
) -> dict[str, Figure]:
    """Of each kind, in milliseconds: what a save adds to the steps around it."""
    objects = state(megabytes, device)
    steps = _nothing if device == "cpu" else partial(_steps, **objects)
    with tempfile.TemporaryDirectory(dir=folder) as saves:
        makers = {kind: checkpointer(kind, f"{saves}/{kind}", objects) for kind in KINDS}
        actions: dict[str, Callable[[], float]] = {
            kind: partial(_stall, maker, steps) for kind, maker in makers.items()
        }
        # The first save in the background takes the memory that the next ones use.
        interleaved(1, actions)
        found = interleaved(rounds, actions)
    return compared({kind: [s * 1e3 for s in taken] for kind, taken in found.items()}, "ms")


def _stall(maker: Any, steps: Callable[[], None]) -> float:
    def with_a_save() -> None:
        steps()
        maker.save_and_keep_only()
        steps()

    without = _taken(lambda: (steps(), steps()))
    stall = _taken(with_a_save) - without
    # Training would go on here; the next measurement must not share the disk.
    getattr(maker, "wait", _nothing)()
    os.sync()
    return stall


def _taken(action: Callable[[], Any]) -> float:
    with Seconds() as watch:
        action()
    return watch.taken


def _nothing() -> None:
    """On the CPU a save takes the time that it takes."""


def _steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What keeps a GPU busy for a while; the host does not wait for it."""
    x = torch.ones(4096, model.in_features, device=model.weight.device)
    with torch.no_grad():
        for _ in range(10):
            model(x)
            optimizer.step()


def peak_memory(kind: str, megabytes: int) -> float:
    """MiB that two saves need beyond the state."""
    command = [sys.executable, "-m", NAME, "--megabytes", str(megabytes), "--peak", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def print_peak(kind: str, megabytes: int) -> None:
    objects = state(megabytes)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        maker = checkpointer(kind, folder, objects)
        # The kernel forgets the peak that making the state has left.
        Path("/proc/self/clear_refs").write_text("5")
        before = _memory("VmRSS")
        for _ in range(2):
            maker.save_and_keep_only()
        getattr(maker, "wait", _nothing)()
    print(_memory("VmHWM") - before)


def _memory(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--megabytes", type=int, default=400, help="of the state; default 400")
    made.add_argument("--peak", choices=KINDS, help="in a process of its own: its peak memory")
    options = made.parse_args()
    # Our tests use one thread; here each core is of use.
    with quiet(threads=os.cpu_count()):
        if options.peak:
            print_peak(options.peak, options.megabytes)
            return
        report = Report(options)
        size = options.megabytes
        rows = {
            kind: {"stall": figure, "memory": Figure([peak_memory(kind, size)], "MiB")}
            for kind, figure in stalls(size, options.rounds, Path.cwd()).items()
        }
        report.table(f"A save of {size} MB", rows)
        report.end()


if __name__ == "__main__":
    main()
