"""How long it takes to go on at batch 0 and at batch 100,000 (``python -m ...resume``)."""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from brain_lightning import Brain, Checkpointer, EpochCounter


class Counted(Dataset[Any]):
    """Examples that are counted when they are loaded."""

    loaded = 0

    def __init__(self, items: int) -> None:
        self.items = items

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> Any:
        Counted.loaded += 1
        return torch.full((4,), float(index))


class Fast(Brain):
    """Trains one batch, from which on the time is taken."""

    until = 0
    first: float | None = None

    def compute_forward(self, batch: Any, stage: Any) -> Any:
        if self.first is None:
            self.first = time.perf_counter()
        return self.modules.model(batch)

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        return predictions.mean()

    def on_fit_batch_end(self, *_: Any) -> None:
        if self.step >= self.until:
            raise KeyboardInterrupt


def run(folder: Path, until: int, batches: int, workers: int) -> float:
    """Returns the seconds from ``fit`` to the first batch."""
    model = torch.nn.Linear(4, 1)
    counter = EpochCounter(1)
    checkpointer = Checkpointer(folder, {"model": model, "counter": counter})
    run_opts = {"device": "cpu", "noprogressbar": True, "ckpt_interval_minutes": 0}
    brain = Fast({"model": model}, torch.optim.Adam, None, run_opts, checkpointer)
    brain.until = until
    loader = DataLoader(Counted(4 * batches), 4, shuffle=True, num_workers=workers)
    started = time.perf_counter()
    try:
        brain.fit(counter, loader)
    except KeyboardInterrupt:
        checkpointer.save_and_keep_only(end_of_epoch=False)
    assert brain.first is not None
    return brain.first - started


def main(position: int) -> None:
    logging.disable(logging.CRITICAL)
    print(f"{'workers':>7}{'at batch':>10}{'first batch after':>19}{'examples loaded':>17}")
    for workers in (0, 2):
        for at in (1, position):
            with tempfile.TemporaryDirectory() as folder:
                if at > 1:
                    _jump(Path(folder), at, workers)
                else:
                    run(Path(folder), 1, position + 100, workers)
                Counted.loaded = 0
                seconds = run(Path(folder), 0, position + 100, workers)
                # In workers they are counted elsewhere.
                loaded = "-" if workers else Counted.loaded
                print(f"{workers:>7}{at:>10}{seconds:>17.2f} s{loaded:>17}", flush=True)


def _jump(folder: Path, at: int, workers: int) -> None:
    """Trains one batch, and saves as if it were the last of many."""
    from brain_lightning.resume.data_position import DataPosition

    original = DataPosition.state

    def state(self: DataPosition, fitted: int, again: bool) -> Any:
        return {**original(self, fitted, again), "batches": at}

    DataPosition.state = state  # type: ignore[method-assign]
    try:
        run(folder, 1, at + 100, workers)
    finally:
        DataPosition.state = original  # type: ignore[method-assign]


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
