"""Bytes that each of two processes holds: fsdp2 against DDP.

``python -m tests.benchmarks.sharded [--json [FILE]]``: 192 MiB of parameters, with AdamW.
Tensors are counted, not what an allocator keeps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from brain_lightning import Brain, FSDP2Strategy, Stage
from tests.support.live_bytes import LiveBytes

from .measure import end_process, quiet
from .report import Figure, Report, compared, parser

MIB = 2**20
WIDTH, BLOCKS = 1024, 6
STRATEGIES = {
    "ddp": lambda: "ddp",
    "fsdp2, blocks": lambda: "fsdp2",
    "fsdp2, entry only": lambda: FSDP2Strategy(blocks=[]),
}


class Block(nn.Module):
    """The feed-forward part of a layer of a Transformer: 32 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.narrow = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(torch.relu(self.wide(x)))


class Encoder(nn.Module):
    """192 MiB of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Measured(Brain):
    """Counts in TRAIN, from its second epoch on, when there are optimizer states."""

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        return self.modules.encoder(batch[0])

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        return predictions.square().mean()

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        if epoch == 1:
            self.live = LiveBytes(_tensors(self))
            self.live.__enter__()

    def on_stage_end(self, stage: Stage, stage_loss: float, epoch: int | None = None) -> None:
        if epoch == 1:
            self.live.__exit__(None, None, None)


def _tensors(brain: Brain) -> Iterator[Tensor]:
    for parameter in brain.modules.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    for state in brain.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def measure(strategy: str) -> None:
    """In one of the processes: prints what the first one holds."""
    torch.manual_seed(0)
    run_opts = {"device": "cpu", "noprogressbar": True}
    brain = Measured({"encoder": Encoder()}, torch.optim.AdamW, None, run_opts)
    data = TensorDataset(torch.randn(8, WIDTH))
    options = {"batch_size": 2}
    trainer = {"strategy": STRATEGIES[strategy](), "devices": 2}
    brain.fit(range(2), data, train_loader_kwargs=options, trainer=trainer)
    if brain._lightning.rank == 0:
        held = LiveBytes(_tensors(brain)).now()
        print(json.dumps({"held": held / MIB, "peak in TRAIN": brain.live.peak / MIB}))
    end_process()


def measured(strategy: str) -> dict[str, float]:
    """What ``measure`` prints in two processes."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *command, "-m", "tests.benchmarks.sharded", "--measure", strategy],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
        check=True, timeout=300,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    made = parser(__doc__, rounds=1)
    made.add_argument("--measure", choices=STRATEGIES, help="in one of the two processes")
    options = made.parse_args()
    with quiet():
        if options.measure:
            measure(options.measure)
            return
    report = Report(options)
    found = {name: [measured(name) for _ in range(options.rounds)] for name in STRATEGIES}
    rows: dict[str, dict[str, Figure]] = {name: {} for name in STRATEGIES}
    for column in found["ddp"][0]:
        values = {name: [each[column] for each in runs] for name, runs in found.items()}
        for name, figure in compared(values, "MiB", base="ddp").items():
            rows[name][column] = figure
    report.table("What each of two processes holds", rows)
    report.end()


if __name__ == "__main__":
    main()
