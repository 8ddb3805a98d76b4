"""Resumes on other numbers of processes what two have saved under DDP and in shards.

``python -m tests.system.sharded_resumes [PROCESSES...]``

Prints the largest difference of what was learned to DDP on as many processes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from tests.fsdp2.test_checkpoints import difference
from tests.support.processes import check_python


def run(processes: int, folder: Path, row: str) -> dict[str, dict[str, torch.Tensor]]:
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    check_python(*launcher, "-m", "tests.fsdp2.saving", str(folder), row)
    found = torch.load(folder / "rank0.pt", weights_only=False)[row]
    assert not isinstance(found, str), found
    return found  # type: ignore[no-any-return]


def main(*numbers: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(2, Path(folder), "resumed")
        for number in map(int, numbers or ("1", "3")):
            rows = run(number, Path(folder), "moved")
            for (first, second), learned in rows.items():
                off = difference(learned, rows["ddp", "ddp"])
                print(f"2 x {first} -> {number} x {second}: {off:.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
