"""How long it takes to go on at batch 1 and at a later one.

``python -m tests.benchmarks.resume [ROUNDS] [--at 100000] [--json [FILE]]``
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from brain_lightning import Brain, Checkpointer, EpochCounter

from .measure import interleaved, quiet
from .report import Figure, Report, compared, parser


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


def resumed(at: int, batches: int, workers: int) -> tuple[float, int]:
    """The seconds from ``fit`` to the first batch, and the examples loaded until then."""
    with tempfile.TemporaryDirectory() as folder:
        if at > 1:
            _jump(Path(folder), at, workers)
        else:
            run(Path(folder), 1, batches, workers)
        Counted.loaded = 0
        seconds = run(Path(folder), 0, batches, workers)
    return seconds, Counted.loaded


def rows_of(workers: int, rounds: int, position: int) -> dict[str, dict[str, Figure]]:
    """With so many workers, at the first batch and at a position."""
    batches = position + 100
    actions = {
        f"{workers} workers, at batch {at}": partial(resumed, at, batches, workers)
        for at in (1, position)
    }
    found = interleaved(rounds, actions)
    base = next(iter(actions))
    times = {name: [s * 1e3 for s, _ in each] for name, each in found.items()}
    rows = {name: {"time": f} for name, f in compared(times, "ms", base).items()}
    # In workers they are counted elsewhere.
    for name in rows if workers == 0 else ():
        rows[name]["loaded"] = Figure([loaded for _, loaded in found[name]], "examples")
    return rows


def main() -> None:
    made = parser(__doc__, rounds=3)
    made.add_argument(
        "--at", type=int, default=100_000, help="the later batch; default 100000"
    )
    options = made.parse_args()
    report = Report(options)
    with quiet():
        rows = [rows_of(workers, options.rounds, options.at) for workers in (0, 2)]
    report.table("From fit to the first batch", {**rows[0], **rows[1]})
    report.end()


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
    main()
