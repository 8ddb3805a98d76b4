"""Parses the command line of a recipe's script, and runs the unmodified script."""

from __future__ import annotations

import importlib.util
import logging
import runpy
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from hyperpyyaml import load_hyperpyyaml, resolve_references
from lightning.pytorch import Callback

from brain_lightning.brain.brain import Brain
from brain_lightning.brain.own_trainer import PROCESSES, OwnTrainer
from brain_lightning.brain.patch import patch_speechbrain
from brain_lightning.distributed.communication import is_launched
from brain_lightning.errors import RecipeError
from brain_lightning.options.parse_arguments import parse_arguments, split_trainer
from brain_lightning.options.trainer_arguments import check_trainer_arguments
from brain_lightning.protocol import TrainerDefaults
from brain_lightning.temporary import TemporaryAttributes

logger = logging.getLogger(__name__)

OVERRIDES = (
    "--name=value must be a key of the hyperparameters file, a run option (listed by "
    "brain-lightning run --help), or --trainer.name=value (listed by --trainer.help)."
)


def parse_command(
    parser: ArgumentParser, words: Sequence[str]
) -> tuple[Namespace, str, list[str]]:
    """Parses the command line of a command that takes a script.

    Args:
        parser: Parser of the command.
        words: Command line after the command.

    Returns:
        The options of the command, the script, and the script's command line.

    Raises:
        SystemExit: The command line has no script. The parser shows its usage.
    """
    options, rest = parser.parse_known_args(words)
    if not rest or rest[0].startswith("-"):
        parser.error("the script must come first, as in: train.py hparams.yaml")
    return options, rest[0], rest[1:]


def parse_run(
    parser: ArgumentParser, words: Sequence[str]
) -> tuple[Namespace, str, list[str], dict[str, Any]]:
    """Parses the command line of a command that runs a script on a Trainer.

    Args:
        parser: Parser of the command.
        words: Command line after the command.

    Returns:
        The values that ``parse_command`` returns, and the Trainer arguments.

    Raises:
        SystemExit: The command line has no script. The parser shows its usage.
        RecipeError: The file of ``--trainer`` cannot be read.
    """
    parser.add_argument(
        "--trainer", metavar="FILE",
        help="a HyperPyYAML file with Trainer arguments, including callbacks and loggers "
        "(!ref reaches only keys of this file); --trainer.X=Y takes precedence over it",
    )  # fmt: skip
    trainer, rest = split_trainer(words)
    options, script, rest = parse_command(parser, rest)
    if options.trainer is not None:
        trainer = {**_load_trainer_file(options.trainer), **trainer}
    return options, script, rest, trainer


def check_script(script: str) -> None:
    """Raises an error if a script does not exist.

    Args:
        script: Path of the script.

    Raises:
        RecipeError: The file does not exist.
    """
    if not Path(script).is_file():
        raise RecipeError(f"script {script!r} was not found in {Path.cwd()}")


def hyperparameters_file(words: Sequence[str]) -> str | None:
    """Finds the hyperparameters file of a script's command line.

    Args:
        words: Command line of the script.

    Returns:
        Path of the file, or None if the command line does not begin with one.

    Raises:
        RecipeError: The file does not exist.
    """
    file = words[0] if words else ""
    if not file.endswith((".yaml", ".yml")):
        return None
    if not Path(file).is_file():
        raise RecipeError(f"hyperparameters file {file!r} was not found in {Path.cwd()}")
    return file


def processes_in_file(words: Sequence[str]) -> dict[str, Any]:
    """Reads ``devices`` and the like from the ``trainer`` section of a hyperparameters file.

    No object that the file names is created.

    Args:
        words: Command line of the script. Its overrides are applied.

    Returns:
        The entries of ``PROCESSES`` and ``accelerator`` that are plain values in the file.

    Raises:
        RecipeError: The file does not exist.
        RunOptionError: An override is not valid.
    """
    file = hyperparameters_file(words)
    if file is None or "trainer" not in _entries(Path(file).read_text(encoding="utf-8")):
        return {}
    with open(file, encoding="utf-8") as stream:
        resolved = resolve_references(stream, parse_arguments(words).overrides)
    trainer = _entries(resolved.getvalue())["trainer"]
    pairs = trainer.value if isinstance(trainer, yaml.MappingNode) else []
    return {
        key.value: yaml.safe_load(yaml.serialize(value))
        for key, value in pairs
        if key.value in (*PROCESSES, "accelerator") and not value.tag.startswith("!")
    }


def _entries(text: str) -> dict[str, yaml.Node]:
    # Composing the YAML reads tags as strings, and creates no object that they name.
    document = yaml.compose(text, yaml.SafeLoader)
    pairs = document.value if isinstance(document, yaml.MappingNode) else []
    return {key.value: value for key, value in pairs}


def with_output_folder(words: Sequence[str], folder: Path) -> list[str]:
    """Sets another ``output_folder``, in which a recipe finds no checkpoint.

    Args:
        words: Command line of the script.
        folder: The folder.

    Returns:
        The command line. If the hyperparameters file has the key ``output_folder``, an
        override of it is appended.
    """
    file = Path(*words[:1])
    if not file.is_file() or "output_folder" not in _entries(file.read_text("utf-8")):
        return list(words)
    return [*_split_output_folder(words)[1], f"--output_folder={folder}"]


@contextmanager
def temporary_output(command: str, words: Sequence[str]) -> Iterator[list[str]]:
    """Sets ``output_folder`` to a temporary folder, unless the command line has one.

    Args:
        command: Name of a command that does not train, for the error message.
        words: Command line of the script.

    Yields:
        The command line, with an override appended if the folder was set.

    Raises:
        RecipeError: If several processes would create a folder each.
    """
    if _split_output_folder(words)[0] is not None:
        yield list(words)
        return
    with TemporaryDirectory(prefix="brain_lightning_") as folder:
        redirected = with_output_folder(words, Path(folder, "output"))
        if is_launched() and redirected != words:
            raise RecipeError(
                f"{command} creates one temporary output_folder per process, and processes "
                "that torchrun or srun started need the same one. Set --output_folder=..., or "
                "let --trainer.devices=2 start the processes."
            )
        yield redirected


def _split_output_folder(words: Sequence[str]) -> tuple[str | None, list[str]]:
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output_folder", nargs="?")
    options, rest = parser.parse_known_args(words)
    return options.output_folder, rest


def run_recipe(
    script: str,
    words: Sequence[str],
    trainer: Mapping[str, Any],
    callbacks: Sequence[Callback] = (),
) -> None:
    """Runs a script as ``python script words`` would, with its Brains on a Trainer.

    Args:
        script: Path of a script that uses SpeechBrain's or brain_lightning's Brain.
        words: Command line of the script: the hyperparameters file, run options, overrides.
        trainer: Arguments of every Trainer. They take precedence over the recipe's.
        callbacks: Callbacks of every Trainer, in addition to the recipe's.

    Raises:
        RecipeError: The script does not exist.
        RunOptionError: A Trainer argument is unknown.
    """
    check_trainer_arguments(trainer)
    with TemporaryAttributes() as temporary:
        defaults = TrainerDefaults(dict(trainer), tuple(callbacks))
        temporary.set(Brain, "_lightning_defaults", defaults)
        if importlib.util.find_spec("speechbrain") is not None:
            try:
                temporary.enter_context(patch_speechbrain(trainer, callbacks))
            except (ImportError, OSError) as error:
                # A script that imports SpeechBrain raises the same error.
                logger.warning("SpeechBrain is installed but cannot be imported: %s", error)
        run_script(script, words)


def run_script(script: str, words: Sequence[str]) -> None:
    """Runs a script as ``python script words`` would.

    Args:
        script: Path of the script.
        words: Command line of the script.

    Raises:
        RecipeError: The script or its hyperparameters file does not exist, or an override
            names no key of the file.
    """
    check_script(script)
    hyperparameters_file(words)
    with TemporaryAttributes() as temporary:
        temporary.set(OwnTrainer, "may_launch", False)
        temporary.set(sys, "argv", [script, *words])
        # As Python does when it runs a script: the script's folder comes first.
        temporary.set(sys, "path", [str(Path(script).resolve().parent), *sys.path[1:]])
        try:
            runpy.run_path(script, run_name="__main__")
        except KeyError as error:
            # HyperPyYAML raises a plain KeyError for an unknown override.
            if str(error.args[0]).startswith("Override"):
                raise RecipeError(f"{error.args[0]}. {OVERRIDES}") from error
            raise


def _load_trainer_file(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            arguments = load_hyperpyyaml(file)
    except OSError as error:
        raise RecipeError(f"--trainer={path}: {error.strerror}") from error
    except Exception as error:
        # The YAML may be invalid, and the classes that it names may raise any error.
        raise RecipeError(f"--trainer={path}: {type(error).__name__}: {error}") from error
    if not isinstance(arguments, dict):
        raise RecipeError(f"--trainer={path}: must be a mapping of Trainer arguments")
    return arguments
