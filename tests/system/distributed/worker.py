"""One of several processes: runs every scenario and leaves the records in a file.

``torchrun --nproc_per_node=2 -m tests.system.distributed.worker FOLDER [BACKEND]``
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

from tests.parity import own_loops
from tests.parity.sides import OURS, PATCHED, SPEECHBRAIN, Record, run
from tests.support.environment import (
    seed_everything,
)  # First: it makes SpeechBrain importable.

from .scenarios import ON_A_GPU, OWN, SHARED


def record_of(side: Any, scenario: Any) -> Record | str:
    try:
        return run(side, scenario)[0]
    except Exception:  # noqa: BLE001  whatever it is, the test shows it
        return traceback.format_exc()


def main(folder: str, backend: str = "gloo") -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    # A rank that fails must not keep the other waiting.
    timeout = datetime.timedelta(seconds=30)
    torch.distributed.init_process_group(backend, timeout=timeout)
    seed_everything(1)
    shared, own = (SHARED, OWN) if backend == "gloo" else (ON_A_GPU, [])
    loops = own_loops.IN_TWO_PROCESSES + own_loops.ENDED if backend == "gloo" else []
    patched = own_loops.PATTERNS if backend == "gloo" else []
    rows = [(s, scenario) for scenario in shared for s in (SPEECHBRAIN, OURS)]
    rows += [(s, scenario) for scenario in loops for s in (SPEECHBRAIN, OURS)]
    rows += [(PATCHED, scenario) for scenario in patched]
    rows += [(OURS, scenario) for scenario in own]
    records = {(side.name, row.__name__): record_of(side, row) for side, row in rows}
    torch.save(records, Path(folder) / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
