"""A script of several processes in which something may happen to one of them.

``torchrun --nproc_per_node=2 -m tests.system.distributed.trains FOLDER WHAT RANK``
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from brain_lightning import Brain, Checkpointer, EpochCounter
from tests.parity.recipes import CLASSES, FEATURES, dataset

STEP = 3


class Noisy(Brain):
    """Dropout, and what is to happen in the second epoch."""

    def compute_forward(self, batch: Any, stage: Any) -> Any:
        epoch = self.hparams.epoch_counter.current
        if stage.name == "TRAIN" and (epoch, self.step) == (2, STEP):
            happens(self.hparams.what, self.hparams.to)
        return self.modules.model(batch[0])

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        return nn.functional.cross_entropy(predictions, batch[1])


def happens(what: str, rank: int) -> None:
    if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) != rank:
        return
    if what == "error":
        raise LookupError("no such word")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)


def main(folder: Path, what: str, rank: int) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.3), nn.Linear(8, CLASSES))
    counter = EpochCounter(3)
    # A folder of each process's own stands for the disk of a node.
    save = folder / os.environ.get("SAVE_IN", "save").format(os.environ.get("RANK"))
    checkpointer = Checkpointer(save, {"model": model, "counter": counter})
    brain = Noisy(
        {"model": model},
        lambda parameters: torch.optim.Adam(parameters, 0.02),
        {"epoch_counter": counter, "what": what, "to": rank},
        {
            "device": "cpu", "distributed_backend": "gloo", "noprogressbar": True,
            "ckpt_interval_steps": 2, "grad_accumulation_factor": 3,
        },
        checkpointer,
    )  # fmt: skip
    brain.fit(
        counter, dataset(), dataset(),
        train_loader_kwargs={"batch_size": 2}, valid_loader_kwargs={"batch_size": 5},
        trainer=None if "RANK" in os.environ else {"devices": 2},
    )  # fmt: skip
    weights = [parameter.detach() for parameter in brain.modules.parameters()]
    torch.save([brain.optimizer_step, *weights], folder / f"rank{brain.rank}.pt")
    if torch.distributed.is_initialized():
        # gloo's threads of one process may abort where the other is gone.
        torch.distributed.barrier()
        # On a busy machine some abort even so, while the interpreter ends.
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
