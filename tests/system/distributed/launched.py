"""A script that starts one process, of which Lightning makes two.

``python -m tests.system.distributed.launched FOLDER``
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.parity.recipes import dataset, make
from tests.parity.sides import OURS, Record, Side, run


def one_module(side: Side, record: Record) -> Any:
    """The scenario of the same name, with the processes asked for in ``fit``."""
    brain = make(side, record)
    brain.fit(
        side.EpochCounter(3), dataset(), dataset(),
        train_loader_kwargs={"batch_size": 4}, valid_loader_kwargs={"batch_size": 5},
        trainer={"devices": 2},
    )  # fmt: skip
    return brain


def main(folder: str) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    record, _ = run(OURS, one_module)
    torch.save(record, Path(folder) / f"launched{os.environ.get('LOCAL_RANK', 0)}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
