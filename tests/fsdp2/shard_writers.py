"""Writes and reads sharded checkpoints on two ranks, and records the results.

Usage: ``torchrun --nproc_per_node=2 -m tests.fsdp2.shard_writers FOLDER [SCENARIO ...]``
"""

from __future__ import annotations

import copy
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
from lightning.pytorch.callbacks import ModelCheckpoint
from speechbrain.utils.checkpoints import Checkpointer as SpeechBrainCheckpointer
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.utils._pytree import tree_leaves

from brain_lightning import Checkpointer, EpochCounter, FSDP2Strategy, ddp_barrier
from brain_lightning.checkpoints.state_files import load_state
from brain_lightning.compat.versions import DTensor
from tests.support.brains import Regression, dataset

RANK = int(os.environ.get("RANK", 0))
IN_SHARDS = ("net", "tied", "optimizer")
EPOCHS, WITHIN_WINDOW = 2, 3


class Net(nn.Module):
    """Has shards of different sizes, an empty shard, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4001)
        self.norm = nn.BatchNorm1d(4001)
        self.last = nn.Linear(4001, 2)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu()) * self.scale


class Tied(nn.Module):
    """Uses one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x))


class Writer(Regression):
    """Saves after the first epoch and within a window of the last one, sharded and full."""

    def compute_forward(self, batch: Any, stage: Any) -> Tensor:
        return self.modules.tied(self.modules.net(batch[0]))

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.recovered = copy.deepcopy(states(self))

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


def writer(folder: Path, seed: int, **trainer: Any) -> Any:
    """Creates a Brain with a Checkpointer. Its initial weights depend on the seed."""
    torch.manual_seed(seed)
    modules = {"net": Net(), "tied": Tied()}
    recoverables = {"counter": EpochCounter(EPOCHS), **modules}
    return Writer(
        modules,
        lambda parameters: torch.optim.Adam(parameters, 0.01),
        {"trainer": trainer},
        {"device": "cpu", "noprogressbar": True, "grad_accumulation_factor": 2},
        Checkpointer(folder, recoverables),
    )


def fit(brain: Any) -> dict[str, Any]:
    sizes = {f"{kind}_loader_kwargs": {"batch_size": 2} for kind in ("train", "valid")}
    counter = brain.checkpointer.recoverables["counter"]
    brain.fit(counter, dataset(16), dataset(16), **sizes)
    return {"recovered": brain.recovered, "trained": states(brain)}


def states(brain: Any) -> dict[str, Any]:
    """Returns the states by the names of the checkpoint's files, as full tensors on rank 0."""
    parts = {**brain.modules, "optimizer": brain.optimizer}
    whole = {name: part.state_dict() for name, part in parts.items()}
    return whole if RANK == 0 else {}


STRATEGIES: dict[str, Callable[[], Any]] = {
    "shards": lambda: FSDP2Strategy(sharded_checkpoints=True),
    "copies": lambda: FSDP2Strategy(sharded_checkpoints=True, replicate=2),
    "fsdp2": lambda: "fsdp2",
    "ddp": lambda: "ddp",
}


def straight(folder: Path) -> Any:
    lightning = ModelCheckpoint(folder / "lightning", filename="last")
    brain = writer(folder, RANK, strategy=STRATEGIES["shards"](), callbacks=[lightning])
    done = fit(brain)
    return {**done, "read": {each: elements_read(folder, brain, each) for each in IN_SHARDS}}


def elements_read(folder: Path, brain: Any, name: str) -> int:
    """Returns how many elements of sharded tensors a rank reads to load its shards."""
    path = folder / "CKPT+window" / f"{name}.ckpt"
    state = load_state(path, brain.checkpointer.recoverables[name])
    leaves = tree_leaves(state)
    return sum(each.to_local().numel() for each in leaves if isinstance(each, DTensor))


def resumed_from(name: str, strategy: str) -> Callable[[Path], Any]:
    def resumed(folder: Path) -> Any:
        if RANK == 0:
            shutil.copytree(folder.parent / "straight" / f"CKPT+{name}", folder / "CKPT+a")
        ddp_barrier()
        return fit(writer(folder, seed=5, strategy=STRATEGIES[strategy]()))

    resumed.__name__ = f"{name}_{strategy}"
    return resumed


def without_shared_disk(folder: Path) -> Any:
    """Recovers a checkpoint that only rank 0 has."""
    if RANK == 0:
        shutil.copytree(folder.parent / "straight" / "CKPT+window", folder / "0" / "CKPT+a")
    return fit(writer(folder / str(RANK), seed=5, strategy="fsdp2"))


def speechbrains_checkpointer(folder: Path) -> Any:
    if RANK == 0:
        shutil.copytree(folder.parent / "straight" / "CKPT+window", folder / "CKPT+a")
    ddp_barrier()
    brain = writer(folder, seed=5, strategy="ddp")
    recoverables = brain.checkpointer.recoverables
    brain.checkpointer = SpeechBrainCheckpointer(folder, recoverables)
    return error_of(lambda: fit(brain))


def no_space_on_rank_1(folder: Path) -> Any:
    brain = writer(folder, RANK, strategy=STRATEGIES["shards"]())
    full = OSError(errno.ENOSPC, "No space left on device")
    fails = {} if RANK == 0 else {"side_effect": full}
    write_data = FileSystemWriter.write_data
    with mock.patch.object(FileSystemWriter, "write_data", **fails or {"new": write_data}):
        raised = error_of(lambda: fit(brain))
    ddp_barrier()
    return raised, sorted(os.listdir(folder))


def private_folders(folder: Path) -> Any:
    brain = writer(folder, RANK, strategy=STRATEGIES["shards"]())
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
    except Exception as error:  # noqa: BLE001  the test shows any error
        return f"{type(error).__name__}: {error}"
    return "none"


RESUMED = [
    resumed_from("window", "shards"), resumed_from("window", "fsdp2"),
    resumed_from("window_whole", "shards"), resumed_from("end", "copies"),
    resumed_from("end", "ddp"), resumed_from("end_whole", "ddp"),
]  # fmt: skip
SCENARIOS: list[Callable[[Path], Any]] = [
    straight, *RESUMED, without_shared_disk, speechbrains_checkpointer, no_space_on_rank_1,
    private_folders,
]  # fmt: skip


def main(folder: Path, *names: str) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    # If one rank fails, the other rank must not hang.
    timeout = datetime.timedelta(seconds=90)
    torch.distributed.init_process_group("gloo", timeout=timeout)
    rows = [row for row in SCENARIOS if not names or row.__name__ in names]
    done = {row.__name__: row(folder / row.__name__) for row in rows}
    torch.save(done, folder / f"rank{RANK}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
