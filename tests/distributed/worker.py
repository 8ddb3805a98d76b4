"""One of several processes: runs every scenario and leaves the records in a file.

``torchrun --nproc_per_node=2 -m tests.distributed.worker FOLDER``
"""

from __future__ import annotations

import datetime
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from ..conftest import seed_everything  # First: it makes SpeechBrain importable.
from ..parity.sides import OURS, SPEECHBRAIN, Record, run
from .scenarios import OWN, SHARED


def record_of(side: Any, scenario: Any) -> Record | str:
    try:
        return run(side, scenario)[0]
    except Exception:  # noqa: BLE001  whatever it is, the test shows it
        return traceback.format_exc()


def main(folder: str) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    # A rank that fails must not keep the other waiting.
    timeout = datetime.timedelta(seconds=30)
    torch.distributed.init_process_group("gloo", timeout=timeout)
    seed_everything(1)
    rows = [(s, scenario) for scenario in SHARED for s in (SPEECHBRAIN, OURS)]
    rows += [(OURS, scenario) for scenario in OWN]
    records = {(side.name, row.__name__): record_of(side, row) for side, row in rows}
    torch.save(records, Path(folder) / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
