"""Creates the process group if a script does not, as ``ddp_init_group`` does."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from brain_lightning.errors import UnsupportedError
from brain_lightning.temporary import TemporaryAttributes

# SpeechBrain's timeout: the main process may prepare data while the other ranks wait.
TIMEOUT = timedelta(seconds=7200)


def check_gpus(backend: str, processes: int) -> None:
    """Raises an error if a process would have no GPU for nccl.

    Args:
        backend: nccl, gloo or mpi, or torch's ``cpu:gloo,cuda:nccl``.
        processes: Number of processes on this machine, as far as this process knows.

    Raises:
        UnsupportedError: There are fewer GPUs than processes.
    """
    gpus = torch.cuda.device_count()
    if "nccl" in backend and processes > gpus:
        raise UnsupportedError(
            f"the backend nccl needs one GPU per process (processes: {processes}, GPUs: "
            f"{gpus}). Use --trainer.devices={gpus or 1}, or --device=cpu "
            "--distributed_backend=gloo."
        )


def use_variables_of_slurm() -> None:
    """Sets torchrun's environment variables from SLURM's, because scripts read them.

    Raises:
        RuntimeError: srun was started without the number of tasks per node.
    """
    task = SLURMEnvironment()
    os.environ.update(
        RANK=str(task.global_rank()),
        LOCAL_RANK=str(task.local_rank()),
        WORLD_SIZE=str(task.world_size()),
        LOCAL_WORLD_SIZE=os.environ["SLURM_NTASKS_PER_NODE"],
        MASTER_ADDR=task.main_address,
        MASTER_PORT=str(task.main_port),
    )


@contextmanager
def process_group(backend: str) -> Iterator[None]:
    """Provides a process group from the first line of a script on, as ``run_on_main`` needs.

    If the script creates a group itself, with SpeechBrain's ``ddp_init_group`` or torch's
    ``init_process_group``, that group replaces this one, with the script's own arguments.

    Args:
        backend: nccl, gloo or mpi, or torch's ``cpu:gloo,cuda:nccl``.

    Raises:
        UnsupportedError: The backend is nccl and this process has no GPU.
    """
    initialize, hook = distributed.init_process_group, sys.excepthook
    _initialize(backend)
    group, prefixing_hook = distributed.group.WORLD, sys.excepthook

    def instead(*args: Any, **kwargs: Any) -> None:
        if distributed.group.WORLD is group:
            distributed.destroy_process_group()
            if sys.excepthook is prefixing_hook:
                # Otherwise each line of a traceback would show its rank twice.
                sys.excepthook = hook
        initialize(*args, **kwargs)

    with TemporaryAttributes() as temporary:
        temporary.set(distributed, "init_process_group", instead)
        yield
    # Not after an error: the other ranks would fail because of it before the cause is shown.
    if distributed.group.WORLD is group:
        distributed.destroy_process_group()


def _initialize(backend: str) -> None:
    local_rank = int(os.environ["LOCAL_RANK"])
    check_gpus(backend, local_rank + 1)
    if "nccl" in backend:
        torch.cuda.set_device(local_rank)
    store, rank, world_size = next(rendezvous("env://", timeout=TIMEOUT))
    store.set_timeout(TIMEOUT)
    # A separate prefix, because the script's own group would find the addresses of this group.
    store = PrefixStore(__name__, store)
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT
    )
