"""Runs a command in as many processes as its Trainer arguments ask for.

``run``, ``preflight`` and ``tune`` share this file.
"""

from __future__ import annotations

import logging
import os
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from brain_lightning.brain.own_trainer import PROCESSES
from brain_lightning.compat.versions import accelerator
from brain_lightning.distributed.communication import is_launched
from brain_lightning.distributed.process_group import (
    check_gpus,
    process_group,
    use_variables_of_slurm,
)
from brain_lightning.errors import RecipeError
from brain_lightning.options.trainer_arguments import check_trainer_arguments

from .script import check_script, processes_in_file

logger = logging.getLogger(__name__)


def run_in_processes(
    words: Sequence[str],
    script: str,
    rest: Sequence[str],
    trainer: dict[str, Any],
    run: Callable[[], None],
) -> int:
    """Runs a recipe, in several processes if the Trainer arguments ask for several.

    Each process that is started here runs the same ``brain-lightning`` command line.

    Args:
        words: Command line after ``brain-lightning``.
        script: Path of the recipe's script.
        rest: Command line of the script.
        trainer: Trainer arguments. Under SLURM a plugin is added to them.
        run: Function that runs the recipe in one process.

    Returns:
        The exit status.

    Raises:
        RecipeError: The script does not exist, or the processes cannot be started.
        RunOptionError: A Trainer argument is unknown.
    """
    # Checked before several processes would all report the same mistake.
    check_script(script)
    check_trainer_arguments(trainer)
    asked = {**processes_in_file(rest), **trainer}
    on_cpu, backend = _device_and_backend(rest, asked)
    processes = processes_to_launch(asked, on_cpu)
    if processes > 1:
        check_gpus(backend, processes)
        return launch(processes, [*words, f"--distributed_backend={backend}"])
    if is_task_of_slurm(asked):
        use_variables_of_slurm()
        # Otherwise Lightning would detect torchrun, whose environment requeues no job.
        trainer.setdefault("plugins", [SLURMEnvironment()])
    with process_group(backend) if is_launched() else nullcontext():
        run()
    return 0


def _device_and_backend(words: Sequence[str], trainer: Mapping[str, Any]) -> tuple[bool, str]:
    """Returns whether a run uses the CPU, and the backend of its process group."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--device", "--distributed_backend"):
        parser.add_argument(name, nargs="?")
    given = parser.parse_known_args(words)[0]
    on_cpu = "cpu" in (given.device, trainer.get("accelerator"))
    on_cpu = on_cpu or not torch.cuda.is_available()
    return on_cpu, given.distributed_backend or ("gloo" if on_cpu else "nccl")


def is_task_of_slurm(trainer: Mapping[str, Any]) -> bool:
    """Returns whether srun started this process as one of the run's processes.

    Args:
        trainer: Trainer arguments.
    """
    asks = any(name in trainer for name in PROCESSES)
    # The script of sbatch is one process, however many tasks it starts later.
    in_a_step = "SLURM_STEP_ID" in os.environ and SLURMEnvironment.detect()
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    return asks and in_a_step and tasks > 1 and not is_launched()


def processes_to_launch(trainer: Mapping[str, Any], on_cpu: bool) -> int:
    """Returns the number of processes that a run has to start.

    Args:
        trainer: Trainer arguments.
        on_cpu: Whether the run uses the CPU, which counts as one device.

    Returns:
        1 if this process is the only one, or if torchrun or srun started it.

    Raises:
        RecipeError: The arguments ask for several nodes, or for devices by index.
    """
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    if is_launched() or is_task_of_slurm(trainer):
        return 1
    if nodes != 1:
        raise RecipeError(
            f"--trainer.num_nodes={nodes}: brain-lightning starts processes on this machine "
            "only. Start each node with torchrun --nnodes=... --nproc_per_node=... "
            "-m brain_lightning run ..., or with srun."
        )
    if devices in ("auto", -1, "-1"):
        return 1 if on_cpu else max(1, int(accelerator.device_count()))
    if devices is None or (isinstance(devices, list) and len(devices) == 1):
        return 1
    if not str(devices).isdecimal():
        raise RecipeError(
            f"--trainer.devices={devices!r} must be a number. To choose the devices, set "
            "CUDA_VISIBLE_DEVICES."
        )
    return int(devices)


def launch(processes: int, words: Sequence[str]) -> int:
    """Runs a command line in several processes on this machine, as torchrun does.

    torchrun's function is called in this process. As a subprocess, torchrun would not receive
    the signals that this process receives, and would exit with 1 for every failure.

    Args:
        processes: Number of processes.
        words: Command line after ``brain-lightning``.

    Returns:
        The exit status of the process that failed first, or of the signal.
    """
    # torchrun sets this default too, and logs a long warning about it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options = ["--standalone", f"--nproc_per_node={processes}", "-m", "brain_lightning"]
    try:
        arguments = torchrun.parse_args([*options, *words])  # type: ignore[no-untyped-call]
        torchrun.run(arguments)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = shell_status(failure.exitcode)
        logger.error("Rank %d failed with exit status %d.", rank, status)
        return status
    except SignalException as error:
        return shell_status(-error.sigval)
    return 0


def shell_status(exit_code: int) -> int:
    """Returns the exit status that a shell shows for a process.

    Args:
        exit_code: Exit code as Python reports it: negative if a signal ended the process.

    Returns:
        128 plus the number of the signal, or the exit code itself.
    """
    return 128 - exit_code if exit_code < 0 else exit_code
