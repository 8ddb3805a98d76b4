"""The time of a validation that is shared out, against whole on each rank.

``torchrun --standalone --nproc_per_node=2 -m tests.benchmarks.shard_eval [ROUNDS]``
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
import warnings
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from brain_lightning import Brain, if_main_process

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


def seconds(shard_eval: bool) -> float:
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
    return brain.seconds


def main(rounds: int) -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seconds(True)
    times = [(seconds(False), seconds(True)) for _ in range(rounds)]
    ratio = statistics.median(shared / whole for whole, shared in times)
    if if_main_process():
        whole, shared = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"whole {whole * 1e3:.0f} ms, shared out {shared * 1e3:.0f} ms, ratio {ratio:.2f}"
        )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
