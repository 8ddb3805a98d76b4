"""A recipe's script, run unedited with its Brains on a Trainer."""

from __future__ import annotations

import importlib.util
import logging
import os
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from hyperpyyaml import load_hyperpyyaml
from lightning.pytorch import Callback
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from brain_lightning.brain.brain import Brain
from brain_lightning.brain.own_trainer import check_trainer_arguments
from brain_lightning.brain.patch import patch_speechbrain
from brain_lightning.compat.versions import accelerator
from brain_lightning.distributed.communication import is_launched
from brain_lightning.errors import RecipeError
from brain_lightning.temporary import TemporaryAttributes

from .exit_status import of_process

logger = logging.getLogger(__name__)

OVERRIDES = (
    "--name=value overrides what the hyperparameters file has; options and arguments of the "
    "Trainer are listed by brain-lightning run --help and --trainer.help"
)


def run_recipe(
    script: str,
    words: Sequence[str],
    trainer: Mapping[str, Any],
    callbacks: Sequence[Callback] = (),
) -> None:
    """Runs a script as ``python script words`` would, with its Brains on a Trainer.

    Args:
        script: The script, on SpeechBrain's Brain or on ours.
        words: Its command line: the hyperparameters file, run options, overrides.
        trainer: Arguments for every Trainer; they outrank the recipe's own.
        callbacks: Callbacks for every Trainer, beside the recipe's own.

    Raises:
        RecipeError: There is no such script.
        RunOptionError: An argument of the Trainer is unknown.
    """
    check_trainer_arguments(trainer)
    with ExitStack() as stack:
        temporary = TemporaryAttributes()
        stack.callback(temporary.restore)
        temporary.set(Brain, "trainer_overrides", dict(trainer))
        temporary.set(Brain, "trainer_callbacks", tuple(callbacks))
        if importlib.util.find_spec("speechbrain") is not None:
            stack.enter_context(_patched(trainer, callbacks))
        run_script(script, words)


def _patched(
    trainer: Mapping[str, Any], callbacks: Sequence[Callback]
) -> AbstractContextManager[Any]:
    try:
        return patch_speechbrain(trainer, callbacks)
    except (ImportError, OSError) as error:
        # A script that needs it will say so itself.
        logger.warning("SpeechBrain is installed but cannot be imported: %s", error)
        return nullcontext()


def run_script(script: str, words: Sequence[str]) -> None:
    """Runs a script as ``python script words`` would.

    Args:
        script: The script.
        words: Its command line.

    Raises:
        RecipeError: There is no such script, or hyperparameters file, or one of the words
            is nothing that can be overridden there.
    """
    if not Path(script).is_file():
        raise RecipeError(f"there is no script {script!r} here, in {Path.cwd()}")
    file = words[0] if words else ""
    if file.endswith((".yaml", ".yml")) and not Path(file).is_file():
        raise RecipeError(f"there is no hyperparameters file {file!r} here, in {Path.cwd()}")
    with _as_main_program(script, words):
        try:
            runpy.run_path(script, run_name="__main__")
        except KeyError as error:
            # What HyperPyYAML says of --name=value; its class tells nothing more.
            if str(error.args[0]).startswith("Override"):
                raise RecipeError(f"{error.args[0]}; {OVERRIDES}") from error
            raise


@contextmanager
def _as_main_program(script: str, words: Sequence[str]) -> Iterator[None]:
    """Python puts the script's folder on the path in the place of the caller's."""
    argv, path = sys.argv[:], sys.path[:]
    sys.argv[:] = [script, *words]
    sys.path[:1] = [str(Path(script).resolve().parent)]
    try:
        yield
    finally:
        sys.argv[:], sys.path[:] = argv, path


def load_trainer_file(path: str) -> dict[str, Any]:
    """Reads arguments of the Trainer, callbacks and loggers among them.

    Args:
        path: A HyperPyYAML file, such as ``callbacks: [!new:lightning...]``.

    Returns:
        Arguments by name.

    Raises:
        RecipeError: It cannot be read, or is no mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            arguments = load_hyperpyyaml(file)
    except OSError as error:
        raise RecipeError(f"--trainer={path}: {error.strerror}") from error
    except Exception as error:
        # Whatever is wrong with the YAML, or with the classes that it names.
        raise RecipeError(f"--trainer={path}: {type(error).__name__}: {error}") from error
    if not isinstance(arguments, dict):
        raise RecipeError(f"--trainer={path}: should be a mapping of Trainer arguments")
    return arguments


def processes_to_launch(trainer: Mapping[str, Any]) -> int:
    """How many processes a run needs to be started in.

    Args:
        trainer: Arguments for the Trainer.

    Returns:
        1 where this process is the only one, or was started by torchrun.

    Raises:
        RecipeError: They are to run on several nodes, or on devices by name.
    """
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    if is_launched():
        return 1
    if nodes != 1:
        raise RecipeError(
            f"--trainer.num_nodes={nodes}: start each node yourself, with torchrun "
            "--nnodes=... --nproc_per_node=... -m brain_lightning run ..."
        )
    if devices in ("auto", -1, "-1"):
        return max(1, int(accelerator.device_count()))
    if not str(devices).isdecimal():
        raise RecipeError(
            f"--trainer.devices={devices!r}: give a number, and choose which ones by "
            "CUDA_VISIBLE_DEVICES"
        )
    return int(devices)


def launch(processes: int, words: Sequence[str]) -> int:
    """Runs this command line in several processes on this machine, as torchrun does.

    Here rather than in a process between, which would be left alone by a signal to this
    one, and which ends with 1 however its processes have ended.

    Args:
        processes: How many.
        words: What follows ``brain-lightning``.

    Returns:
        The exit status: of the process that failed first, or of the signal.
    """
    # As torchrun does, which tells of it at length.
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
