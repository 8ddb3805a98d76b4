"""Kills processes in the middle of saves, and looks at what can be recovered.

``python -m tests.system.checkpoint_kills [KILLS]`` does as many as asked for in each setting
and prints a table; the tests do a few.
"""

from __future__ import annotations

import logging
import os
import random
import select
import signal
import struct
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.support.states import State

# Settings: how saves are named, and where they are written.
SETTINGS = {
    "timestamps": {},
    "fixed name": {"name": "latest"},
    "background": {"async_save": True},
    "background, fixed name": {"name": "latest", "async_save": True},
}


@dataclass
class Outcome:
    """What was seen after kills."""

    kills: int = 0
    crashes: int = 0
    mixed: int = 0
    lost: int = 0

    @property
    def clean(self) -> bool:
        return not (self.crashes or self.mixed or self.lost)


def kill_saves(folder: Path, kills: int, seed: int, **setting: Any) -> Outcome:
    """Saves without end in a process, kills it at a random instant, recovers; again."""
    rng = random.Random(seed)  # noqa: S311
    outcome, durable = Outcome(), 0
    for _ in range(kills):
        durable = max(durable, _killed(folder, durable + 1, rng.uniform(0.0, 0.06), setting))
        outcome.kills += 1
        state = State(folder)
        try:
            found = state.checkpointer.recover_if_possible()
        except Exception:  # noqa: BLE001  whatever it is, it is a crash
            outcome.crashes += 1
            continue
        values = state.values() if found else {0.0}
        outcome.mixed += len(values) > 1
        outcome.lost += max(values) < durable
        durable = max(durable, int(max(values)))
    return outcome


def _killed(folder: Path, start: int, delay: float, setting: dict[str, Any]) -> int:
    """Returns the last value that the process knew to be durable before it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _save_without_end(folder, start, writer, **setting)
        finally:
            # Never the parent's code.
            os._exit(1)
    os.close(writer)
    told = os.read(reader, 4)
    end = time.monotonic() + delay
    while (left := end - time.monotonic()) > 0 and select.select([reader], [], [], left)[0]:
        told += os.read(reader, 4096)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reader, 4096):
        told += more
    os.close(reader)
    known = [value for (value,) in struct.iter_unpack("i", told[: len(told) // 4 * 4])]
    return max(known)


def _save_without_end(
    folder: Path, start: int, writer: int, name: str | None = None, async_save: bool = False
) -> None:
    logging.disable(logging.CRITICAL)
    state = State(folder)
    state.checkpointer.async_save = async_save
    os.write(writer, struct.pack("i", 0))
    for value in range(start, start + 10_000):
        state.set(value)
        state.checkpointer.save_and_keep_only(name=name)
        # In the background the one before is durable by now.
        durable = value - async_save
        if durable >= start:
            os.write(writer, struct.pack("i", durable))


def main(kills: int) -> None:
    logging.disable(logging.CRITICAL)
    print(f"{'setting':<28}{'TMPDIR':<12}{'kills':>7}{'crashes':>9}{'mixed':>7}{'lost':>6}")
    for temporary in ("/tmp", "/dev/shm"):  # noqa: S108
        os.environ["TMPDIR"] = temporary
        for name, setting in SETTINGS.items():
            with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
                o = kill_saves(Path(folder), kills, seed=kills, **setting)
            row = f"{name:<28}{temporary:<12}{o.kills:>7}{o.crashes:>9}{o.mixed:>7}{o.lost:>6}"
            print(row, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
