"""What two processes did in DDP, which several files compare with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from tests.support.processes import TORCHRUN, check_python

RANKS = (0, 1)


def records_of(folder: Path, **environment: str) -> list[dict[Any, Any]]:
    """Has the worker run, unless it did, in whatever process of pytest."""
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "done").exists():
            worker = ("-m", "tests.system.distributed.worker", str(folder))
            check_python(*TORCHRUN, *worker, **environment)
            (folder / "done").touch()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in RANKS]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all processes of this pytest."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="module")
def records(shared_folder: Path) -> list[dict[Any, Any]]:
    """What each rank did in DDP, by side and scenario."""
    return records_of(shared_folder / "ddp")
