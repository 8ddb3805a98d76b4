"""How long training stands still for a save, against SpeechBrain's, in one run.

``python -m tests.benchmarks.checkpoint_stall [MEGABYTES] [ROUNDS]``

Rounds are interleaved, for the machine is shared; the ratio is that of the medians. Every save
keeps one checkpoint, as recipes do. Peak memory is of a process for each.
"""

from __future__ import annotations

import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.support.environment import (
    seed_everything,
)  # First: it makes SpeechBrain importable.

KINDS = ("SpeechBrain", "synchronous", "background")


def state(megabytes: int) -> dict[str, Any]:
    """A model with Adam: a third of the numbers each are weights and the two averages."""
    columns = 1024
    model = torch.nn.Linear(columns, megabytes * 2**20 // 4 // 3 // columns, bias=False)
    optimizer = torch.optim.Adam(model.parameters())
    model.weight.grad = torch.randn_like(model.weight)
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def checkpointer(kind: str, folder: str, objects: dict[str, Any]) -> Any:
    if kind == "SpeechBrain":
        from speechbrain.utils.checkpoints import Checkpointer

        return Checkpointer(folder, objects)
    import brain_lightning

    ours = brain_lightning.Checkpointer(folder, objects)
    ours.async_save = kind == "background"
    return ours


def stalls(megabytes: int, rounds: int) -> dict[str, list[float]]:
    objects = state(megabytes)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        makers = {kind: checkpointer(kind, f"{folder}/{kind}", objects) for kind in KINDS}
        for _ in range(rounds):
            for kind, maker in makers.items():
                start = time.perf_counter()
                maker.save_and_keep_only()
                found[kind].append(time.perf_counter() - start)
                # Training would go on here; the next measurement must not share the disk.
                getattr(maker, "wait", lambda: None)()
                subprocess.run(["/usr/bin/sync"], check=True)
    return found


def peak_memory(kind: str, megabytes: int) -> float:
    """MiB that two saves need beyond the state."""
    command = [sys.executable, "-m", __spec__.name, "--peak", kind, str(megabytes)]
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
        getattr(maker, "wait", lambda: None)()
    print(_memory("VmHWM") - before)


def _memory(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def main(megabytes: int = 400, rounds: int = 7) -> None:
    found = stalls(megabytes, rounds)
    theirs = statistics.median(found["SpeechBrain"])
    print(f"a state of {megabytes} MB, {rounds} rounds, interleaved")
    print(f"{'':<14}{'median stall':>14}{'ratio':>8}{'peak memory':>14}")
    for kind, seconds in found.items():
        median = statistics.median(seconds)
        peak = peak_memory(kind, megabytes)
        print(f"{kind:<14}{median * 1000:>11.0f} ms{median / theirs:>8.2f}{peak:>10.0f} MiB")


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    seed_everything(0)
    # Our tests use one thread.
    torch.set_num_threads(os.cpu_count() or 1)
    if sys.argv[1:2] == ["--peak"]:
        print_peak(sys.argv[2], int(sys.argv[3]))
    else:
        main(*map(int, sys.argv[1:]))
