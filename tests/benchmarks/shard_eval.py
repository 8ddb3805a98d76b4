"""The time of a validation that is shared out, against whole on each rank.

``torchrun --standalone --nproc_per_node=2 -m tests.benchmarks.shard_eval [ROUNDS]
[--json FILE]``
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from brain_lightning import Brain, if_main_process

from .measure import end_process, interleaved, quiet
from .report import Report, compared, parser

ITEMS, BATCH, WIDTH = 101 * 8, 8, 768


class Validated(Brain):
    """Takes the time of its validations."""

    def compute_forward(self, batch: Any, stage: Any) -> Any:
        return self.modules.model(batch[0])

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        return predictions.square().mean()

    def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        self.started = time.perf_counter()

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        if stage.name == "VALID":
            self.seconds = time.perf_counter() - self.started


def milliseconds(shard_eval: bool) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(8)))
    run_opts = {
        "device": "cpu", "noprogressbar": True, "distributed_backend": "gloo",
        "shard_eval": shard_eval,
    }  # fmt: skip
    brain = Validated({"model": model}, torch.optim.SGD, None, run_opts)
    data = TensorDataset(torch.randn(ITEMS, WIDTH))
    train = TensorDataset(torch.randn(4, WIDTH))
    brain.fit(range(1), train, data, valid_loader_kwargs={"batch_size": BATCH})
    return brain.seconds * 1e3


def main() -> None:
    options = parser(__doc__).parse_args()
    report = Report(options)
    with quiet():
        kinds = {"whole on each": False, "shared out": True}
        actions = {name: partial(milliseconds, shared) for name, shared in kinds.items()}
        interleaved(1, actions)
        figures = compared(interleaved(options.rounds, actions), "ms", base="whole on each")
    if if_main_process():
        report.table("A validation", {name: {"time": f} for name, f in figures.items()})
        report.end()
    end_process()


if __name__ == "__main__":
    main()
