"""Processes that write their own shards, and read each other's: what they were told, or have.

``torchrun --nproc_per_node=2 -m tests.fsdp2.shard_writers FOLDER``
"""

from __future__ import annotations

import datetime
import errno
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from brain_lightning import Checkpointer, EpochCounter, FSDP2Strategy, ddp_barrier
from tests.support.brains import Regression, dataset

RANK = int(os.environ.get("RANK", 0))
EPOCHS, WITHIN_WINDOW = 2, 3


class Net(nn.Module):
    """Shards of different sizes, of none, buffers, and a weight that is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 64)
        self.norm = nn.BatchNorm1d(64)
        self.second = nn.Linear(64, 64)
        self.again = nn.Linear(64, 64)
        self.again.weight = self.second.weight
        self.last = nn.Linear(64, 2)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.norm(self.first(x))).relu()
        return self.last(self.again(hidden)) * self.scale


class Writer(Regression):
    """Saves in a window of the last epoch, and when the first is over, in shards and whole."""

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        if self.epoch == EPOCHS and self.step == WITHIN_WINDOW:
            assert not should_step
            self.save("window", end_of_epoch=False)

    def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
        self.epoch = epoch

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        if stage.name == "VALID" and epoch < EPOCHS:
            self.save("end", end_of_epoch=True)

    def save(self, name: str, end_of_epoch: bool) -> None:
        self.checkpointer.save_checkpoint({"WER": 1.5}, end_of_epoch, name)
        if self.checkpointer.writes_shards:
            with mock.patch.object(self.checkpointer, "writes_shards", False):
                self.checkpointer.save_checkpoint({"WER": 1.5}, end_of_epoch, f"{name}_whole")


def writer(folder: Path, strategy: Any = None, seed: int = RANK) -> Any:
    """A Brain with a Checkpointer; each process, and each Brain, begins somewhere else."""
    torch.manual_seed(seed)
    brain = Writer(
        {"model": Net()},
        lambda parameters: torch.optim.Adam(parameters, 0.01),
        None if strategy is None else {"trainer": {"strategy": strategy}},
        {"device": "cpu", "noprogressbar": True, "grad_accumulation_factor": 2},
        Checkpointer(folder, {"counter": EpochCounter(EPOCHS)}),
    )
    brain.checkpointer.add_recoverable("model", brain.modules.model)
    return brain


def fit(brain: Any) -> dict[str, Any]:
    sizes = {f"{kind}_loader_kwargs": {"batch_size": 2} for kind in ("train", "valid")}
    counter = brain.checkpointer.recoverables["counter"]
    brain.fit(counter, dataset(16), dataset(16), **sizes)
    return states(brain)


def states(brain: Any) -> dict[str, Any]:
    """What is trained, whole in the main process."""
    parts = {"model": brain.modules.model, "optimizer": brain.optimizer}
    return {name: part.state_dict() for name, part in parts.items()} if parts else {}


def in_shards() -> FSDP2Strategy:
    return FSDP2Strategy(sharded_checkpoints=True)


def straight(folder: Path) -> Any:
    return fit(writer(folder, in_shards()))


def resumed_from(name: str, strategy: Callable[[], Any]) -> Callable[[Path], Any]:
    def resumed(folder: Path) -> Any:
        if RANK == 0:
            shutil.copytree(folder.parent / "straight" / f"CKPT+{name}", folder / "CKPT+a")
        ddp_barrier()
        return fit(writer(folder, strategy(), seed=5))

    resumed.__name__ = f"{name}_{strategy.__name__}"
    return resumed


def whole() -> Any:
    return "fsdp2"


def ddp() -> Any:
    return "ddp"


def without_shared_disk(folder: Path) -> Any:
    """What rank 0 has is sent to the other."""
    if RANK == 0:
        shutil.copytree(folder.parent / "straight" / "CKPT+window", folder / "0" / "CKPT+a")
    return fit(writer(folder / str(RANK), "fsdp2", seed=5))


def no_space_on_rank_1(folder: Path) -> Any:
    brain = writer(folder, in_shards())
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch.object(FileSystemWriter, "write_data", side_effect=full):
        raised = error_of(lambda: fit(brain)) if RANK == 1 else None
    if RANK == 0:
        raised = error_of(lambda: fit(brain))
    ddp_barrier()
    return raised, sorted(os.listdir(folder))


def private_folders(folder: Path) -> Any:
    brain = writer(folder, in_shards())
    is_dir = Path.is_dir

    def is_seen(path: Path) -> bool:
        return is_dir(path) and (RANK == 0 or not path.name.startswith(".writing"))

    with mock.patch.object(Path, "is_dir", is_seen):
        raised = error_of(lambda: fit(brain))
    ddp_barrier()
    return raised, sorted(os.listdir(folder)), hasattr(brain, "epoch")


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:  # noqa: BLE001  whatever it is, the test shows it
        return f"{type(error).__name__}: {error}"
    return "none"


SCENARIOS: list[Callable[[Path], Any]] = [
    straight,
    *(resumed_from("window", each) for each in (in_shards, whole)),
    *(resumed_from("end", each) for each in (in_shards, whole, ddp)),
    resumed_from("window_whole", in_shards),
    without_shared_disk,
    no_space_on_rank_1,
    private_folders,
]


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    # A process that fails must not keep the other waiting.
    timeout = datetime.timedelta(seconds=20)
    torch.distributed.init_process_group("gloo", timeout=timeout)
    done = {row.__name__: row(folder / row.__name__) for row in SCENARIOS}
    torch.save(done, folder / f"rank{RANK}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
