"""One of several processes: runs every scenario and leaves the records in a file.

``torchrun --nproc_per_node=2 -m tests.system.distributed.worker FOLDER [BACKEND]``

With ``STRATEGY=fsdp2`` in the environment these are ours alone, in shards; on three processes
with ``--nproc_per_node=3``. There DDP divides by 3 and then adds, and FSDP2 adds and then
divides: records differ by rounding (5e-7), and are equal, but for ``test_sharded.BOUNDS`` and
gradients of several backward passes, with ``AVERAGES=float64``, which has both average in it.
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
from unittest import mock

import torch
from torch.nn.parallel import DistributedDataParallel

from brain_lightning import FSDP2Strategy
from brain_lightning.fsdp2 import shard
from tests.parity import own_loops
from tests.parity.sides import OURS, PATCHED, SPEECHBRAIN, Record, run
from tests.support.environment import (
    seed_everything,
)  # First: it makes SpeechBrain importable.

from . import memory_scenarios, sharded_scenarios
from .scenarios import GLOO, ON_A_GPU, ON_A_TRAINER, OWN, SHARED, STRATEGY

Row = tuple[Any, Any]


def record_of(side: Any, scenario: Any, **trainer: Any) -> Record | str:
    try:
        return run(side, scenario, **trainer)[0]
    except Exception:  # noqa: BLE001  whatever it is, the test shows it
        return traceback.format_exc()


def rows(backend: str) -> list[Row]:
    """What runs in DDP, on which side."""
    if backend != "gloo":
        return [(s, scenario) for scenario in ON_A_GPU for s in (SPEECHBRAIN, OURS)]
    both = [*SHARED, *own_loops.IN_TWO_PROCESSES, *own_loops.ENDED]
    found = [(s, scenario) for scenario in both for s in (SPEECHBRAIN, OURS)]
    found += [(PATCHED, scenario) for scenario in own_loops.PATTERNS]
    own = (*OWN, *ON_A_TRAINER, *memory_scenarios.SCENARIOS)
    return found + [(OURS, scenario) for scenario in own]


def averaged_together() -> dict[tuple[str, str], Any]:
    """What runs in DDP, where all processes give up a batch for which one has no memory."""
    with mock.patch.dict(GLOO, {"oom_patience": 0}):
        rows = memory_scenarios.AVERAGED
        return {("together", row.__name__): record_of(OURS, row) for row in rows}


def sharded_records() -> dict[tuple[str, str], Any]:
    """What runs in shards; what DDP is not asked about elsewhere runs in DDP too."""
    loops = [*own_loops.IN_TWO_PROCESSES, *own_loops.ENDED]
    ours = [s for s in (*SHARED, *loops, *OWN) if s.__name__ not in sharded_scenarios.LEFT_OUT]
    sharded = [(OURS, scenario) for scenario in ours]
    sharded += [(PATCHED, scenario) for scenario in own_loops.PATTERNS]
    new = [(side, row) for row in sharded_scenarios.NEW for side in (OURS, PATCHED)]
    records = {
        (f"{side.name} sharded", row.__name__): record_of(side, row, strategy=strategy_of(row))
        for side, row in (*sharded, *new)
    }
    for row in ON_A_TRAINER:
        records["brain_lightning sharded", row.__name__] = record_of(OURS, row)
    return records | {(side.name, row.__name__): record_of(side, row) for side, row in new}


def strategy_of(scenario: Any) -> Any:
    blocks = sharded_scenarios.BLOCKS.get(scenario.__name__)
    return "fsdp2" if blocks is None else FSDP2Strategy(blocks=blocks)


def average_in_float64() -> None:
    """Has DDP and FSDP2 round the average of gradients once, whatever order they add up in."""

    def averaged(bucket: Any) -> Any:
        gradients = bucket.buffer().double()
        reduced = torch.distributed.all_reduce(gradients, async_op=True).get_future()
        size = torch.distributed.get_world_size()
        return reduced.then(lambda _: bucket.buffer().copy_(gradients / size))

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain_init(self, *args, **kwargs)
        self.register_comm_hook(None, lambda _, bucket: averaged(bucket))

    from torch.distributed.fsdp import MixedPrecisionPolicy

    def options(*args: Any) -> dict[str, Any]:
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float64, cast_forward_inputs=False)
        return {**plain_options(*args), "mp_policy": policy}

    plain_init, plain_options = DistributedDataParallel.__init__, shard._options
    DistributedDataParallel.__init__, shard._options = init, options


def main(folder: str, backend: str = "gloo") -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    # A rank that fails must not keep the other waiting.
    timeout = datetime.timedelta(seconds=90)
    torch.distributed.init_process_group(backend, timeout=timeout)
    seed_everything(1)
    if os.environ.get("AVERAGES") == "float64":
        average_in_float64()
    if STRATEGY == "fsdp2":
        records = sharded_records()
    else:
        records = {
            (side.name, row.__name__): record_of(side, row) for side, row in rows(backend)
        }
        records |= averaged_together() if backend == "gloo" else {}
    torch.save(records, Path(folder) / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
