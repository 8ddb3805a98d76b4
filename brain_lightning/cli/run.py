"""``brain-lightning run``: a recipe on a Trainer, in as many processes as are asked for."""

from __future__ import annotations

import logging
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
from brain_lightning.errors import RecipeError, RunOptionError
from brain_lightning.loggers.curve_plot import CurvePlot
from brain_lightning.loggers.objective import Objective
from brain_lightning.options.parse_arguments import TRAINER_HELP
from brain_lightning.options.run_options import RunOptions
from brain_lightning.options.trainer_arguments import check_trainer_arguments
from brain_lightning.protocol import OURS_ALONE

from .exit_status import EXPLANATION, of_process
from .script import (
    check_script,
    parse_run,
    processes_in_file,
    run_recipe,
)

logger = logging.getLogger(__name__)

OPTIONS = f"""\
run options (SpeechBrain's own Brain has none of {", ".join(f"--{n}" for n in OURS_ALONE)}):
{{}}

arguments of Lightning's Trainer:
  --trainer.NAME=VALUE, as --trainer.max_steps=1000; {TRAINER_HELP} lists them

Any other --name=value overrides the hyperparameters file, as in SpeechBrain.

"""


def main(parser: ArgumentParser, words: list[str]) -> int:
    """Runs a recipe.

    Args:
        parser: The parser of this command.
        words: What follows the command.

    Returns:
        The exit status.
    """
    _describe(parser)
    # Alone it takes no value: what follows may be the script.
    plotted = ["--plot=" if word == "--plot" else word for word in words]
    options, script, rest, trainer = parse_run(parser, plotted)
    objective = _objective(options)
    plot = None if options.plot is None else CurvePlot(options.plot or None)
    callbacks = [each for each in (plot, objective) if each is not None]

    def run() -> None:
        with nullcontext() if objective is None else _reported(objective):
            run_recipe(script, rest, trainer, callbacks)

    return in_processes(["run", *words], script, rest, trainer, run)


def in_processes(
    words: Sequence[str],
    script: str,
    rest: Sequence[str],
    trainer: dict[str, Any],
    run: Callable[[], None],
) -> int:
    """Runs a recipe in as many processes as are asked for, in each of them this command.

    Args:
        words: What follows ``brain-lightning``.
        script: The recipe's script.
        rest: The script's command line.
        trainer: Arguments for the Trainer, which may get a plugin.
        run: Runs the recipe in one process.

    Returns:
        The exit status.

    Raises:
        RecipeError: There is no such script, or processes that cannot be started here.
        RunOptionError: An argument of the Trainer is unknown.
    """
    # Before each of several processes says so.
    check_script(script)
    check_trainer_arguments(trainer)
    asked = {**processes_in_file(rest), **trainer}
    on_cpu, backend = _where(rest, asked)
    processes = processes_to_launch(asked, on_cpu)
    if processes > 1:
        check_gpus(backend, processes)
        return launch(processes, [*words, f"--distributed_backend={backend}"])
    if is_task_of_slurm(asked):
        use_variables_of_slurm()
        # Lightning would take torchrun's variables for torchrun, which requeues no job.
        trainer.setdefault("plugins", [SLURMEnvironment()])
    with process_group(backend) if is_launched() else nullcontext():
        run()
    return 0


def _describe(parser: ArgumentParser) -> None:
    """Adds the options of the command, and what ``--help`` says of it."""
    parser.usage = (
        "%(prog)s SCRIPT [HPARAMS] [--override=value] [--trainer.X=Y] [--trainer=FILE] "
        "[--plot[=FILE.png]] [--report=NAME [--report-file=FILE.json]]"
    )
    parser.description = "Runs a SpeechBrain recipe, its Brains on a Trainer."
    listed = [f"  --{name:<38}{text}" for name, text in RunOptions.on_command_line().items()]
    parser.epilog = OPTIONS.format("\n".join(listed)) + EXPLANATION
    parser.add_argument(
        "--plot", metavar="=FILE.png", nargs="?",
        help="draw curves of losses and metrics at each end of an epoch; --plot=FILE.png "
        "says where (default: curves.png in the recipe's output_folder)",
    )  # fmt: skip
    parser.add_argument(
        "--report", metavar="NAME[:max]",
        help="print the best value of a number that the recipe reports, such as WER, as the "
        "last line; the smallest one, or with ACC:max the largest",
    )  # fmt: skip
    parser.add_argument(
        "--report-file", metavar="FILE.json", help="write it there too, with its epoch"
    )


def _objective(options: Namespace) -> Objective | None:
    if options.report is not None:
        return Objective(options.report, options.report_file)
    if options.report_file is not None:
        raise RunOptionError("--report-file: say what to report too, as in --report=WER")
    return None


@contextmanager
def _reported(objective: Objective) -> Iterator[None]:
    """Reports once a recipe is over, which it may be by an exit that says that all is well."""
    try:
        yield
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    objective.report()


def _where(words: Sequence[str], trainer: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether a run is on the CPU, and the backend by which its processes communicate."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--device", "--distributed_backend"):
        parser.add_argument(name, nargs="?")
    given = parser.parse_known_args(words)[0]
    on_cpu = "cpu" in (given.device, trainer.get("accelerator"))
    on_cpu = on_cpu or not torch.cuda.is_available()
    return on_cpu, given.distributed_backend or ("gloo" if on_cpu else "nccl")


def is_task_of_slurm(trainer: Mapping[str, Any]) -> bool:
    """Whether srun has started the processes that a run asks for, this one among them.

    Args:
        trainer: Arguments for the Trainer.
    """
    asks = any(name in trainer for name in PROCESSES)
    # Not so in the script of sbatch, which is one process, whatever tasks it may start.
    in_a_step = "SLURM_STEP_ID" in os.environ and SLURMEnvironment.detect()
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    return asks and in_a_step and tasks > 1 and not is_launched()


def processes_to_launch(trainer: Mapping[str, Any], on_cpu: bool) -> int:
    """How many processes a run needs to be started in.

    Args:
        trainer: Arguments for the Trainer.
        on_cpu: Whether they run there, which is one device.

    Returns:
        1 where this process is the only one, or was started by torchrun or srun.

    Raises:
        RecipeError: Several nodes, or devices by name, are asked for.
    """
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    if is_launched() or is_task_of_slurm(trainer):
        return 1
    if nodes != 1:
        raise RecipeError(
            f"--trainer.num_nodes={nodes}: start each node yourself, with torchrun "
            "--nnodes=... --nproc_per_node=... -m brain_lightning run ..., or with srun"
        )
    if devices in ("auto", -1, "-1"):
        return 1 if on_cpu else max(1, int(accelerator.device_count()))
    if devices is None or (isinstance(devices, list) and len(devices) == 1):
        return 1
    if not str(devices).isdecimal():
        raise RecipeError(
            f"--trainer.devices={devices!r}: give a number, and choose which ones by "
            "CUDA_VISIBLE_DEVICES"
        )
    return int(devices)


def launch(processes: int, words: Sequence[str]) -> int:
    """Runs this command line in several processes on this machine, as torchrun does.

    Called here rather than started as a process, which a signal to this one would not reach,
    and whose exit status is 1 whatever its processes' are.

    Args:
        processes: How many.
        words: What follows ``brain-lightning``.

    Returns:
        The exit status: of the process that failed first, or of the signal.
    """
    # As torchrun does, which logs that at length.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options = ["--standalone", f"--nproc_per_node={processes}", "-m", "brain_lightning"]
    try:
        arguments = torchrun.parse_args([*options, *words])  # type: ignore[no-untyped-call]
        torchrun.run(arguments)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = of_process(failure.exitcode)
        logger.error("Rank %d has failed, with status %d.", rank, status)
        return status
    except SignalException as error:
        return of_process(-error.sigval)
    return 0
