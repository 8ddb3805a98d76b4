"""Runs a recipe's script, unedited, as ``python script`` would."""

from __future__ import annotations

import importlib.util
import logging
import runpy
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hyperpyyaml import load_hyperpyyaml, resolve_references
from lightning.pytorch import Callback

from brain_lightning.brain.brain import Brain
from brain_lightning.brain.own_trainer import PROCESSES, OwnTrainer
from brain_lightning.brain.patch import patch_speechbrain
from brain_lightning.errors import RecipeError
from brain_lightning.options.parse_arguments import parse_arguments, split_trainer
from brain_lightning.options.trainer_arguments import check_trainer_arguments
from brain_lightning.protocol import TrainerDefaults
from brain_lightning.temporary import TemporaryAttributes

logger = logging.getLogger(__name__)

OVERRIDES = (
    "--name=value overrides what the hyperparameters file has; options and arguments of the "
    "Trainer are listed by brain-lightning run --help and --trainer.help"
)


def parse_command(
    parser: ArgumentParser, words: Sequence[str]
) -> tuple[Namespace, str, list[str]]:
    """Parses the command line of a command that is given a script.

    Args:
        parser: The parser of the command.
        words: What follows the command.

    Returns:
        The command's own options, the script, and the script's command line.

    Raises:
        SystemExit: There is no script; the parser shows its usage.
    """
    options, rest = parser.parse_known_args(words)
    if not rest or rest[0].startswith("-"):
        parser.error("the script comes first: train.py hparams.yaml")
    return options, rest[0], rest[1:]


def parse_run(
    parser: ArgumentParser, words: Sequence[str]
) -> tuple[Namespace, str, list[str], dict[str, Any]]:
    """Parses the command line of a command that runs a script on a Trainer.

    Args:
        parser: The parser of the command.
        words: What follows the command.

    Returns:
        As ``parse_command``, and the arguments of the Trainer.

    Raises:
        SystemExit: There is no script; the parser shows its usage.
        RecipeError: The file of ``--trainer`` cannot be read.
    """
    parser.add_argument(
        "--trainer", metavar="FILE",
        help="a HyperPyYAML file with Trainer arguments, callbacks and loggers among them, "
        "its paths in full; --trainer.X=Y outranks it",
    )  # fmt: skip
    trainer, rest = split_trainer(words)
    options, script, rest = parse_command(parser, rest)
    if options.trainer is not None:
        trainer = {**_load_trainer_file(options.trainer), **trainer}
    return options, script, rest, trainer


def check_script(script: str) -> None:
    """Refuses a script that is not there.

    Args:
        script: The script.

    Raises:
        RecipeError: There is no such file.
    """
    if not Path(script).is_file():
        raise RecipeError(f"there is no script {script!r} here, in {Path.cwd()}")


def hyperparameters_file(words: Sequence[str]) -> str | None:
    """Finds the hyperparameters file of a script's command line.

    Args:
        words: The command line.

    Returns:
        The file; None where the command line does not begin with one.

    Raises:
        RecipeError: There is no such file.
    """
    file = words[0] if words else ""
    if not file.endswith((".yaml", ".yml")):
        return None
    if not Path(file).is_file():
        raise RecipeError(f"there is no hyperparameters file {file!r} here, in {Path.cwd()}")
    return file


def processes_in_file(words: Sequence[str]) -> dict[str, Any]:
    """In how many processes the ``trainer`` section of a hyperparameters file asks to run.

    Nothing that the file names is made.

    Args:
        words: The script's command line, whose overrides count.

    Returns:
        Those of ``PROCESSES`` and ``accelerator`` that it has as plain values.

    Raises:
        RecipeError: There is no such file.
        RunOptionError: An override is none.
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
    # Composed alone: the tags are text, and nothing that they name is made.
    document = yaml.compose(text, yaml.SafeLoader)
    pairs = document.value if isinstance(document, yaml.MappingNode) else []
    return {key.value: value for key, value in pairs}


def with_output_folder(words: Sequence[str], folder: Path) -> list[str]:
    """Has a recipe write to another folder, and find no checkpoint there.

    Args:
        words: The script's command line.
        folder: What takes the place of ``output_folder``.

    Returns:
        The command line, with one word more where the hyperparameters file has that key.
    """
    file = Path(*words[:1])
    if not file.is_file() or "output_folder" not in _entries(file.read_text("utf-8")):
        return list(words)
    return [*_split_output_folder(words)[1], f"--output_folder={folder}"]


def names_output_folder(words: Sequence[str]) -> bool:
    """Whether a command line says where to write.

    Args:
        words: The script's command line.
    """
    return _split_output_folder(words)[0] is not None


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
        script: The script, on SpeechBrain's Brain or on ours.
        words: Its command line: the hyperparameters file, run options, overrides.
        trainer: Arguments for every Trainer; they outrank the recipe's own.
        callbacks: Callbacks for every Trainer, beside the recipe's own.

    Raises:
        RecipeError: There is no such script.
        RunOptionError: An argument of the Trainer is unknown.
    """
    check_trainer_arguments(trainer)
    with TemporaryAttributes() as temporary:
        defaults = TrainerDefaults(dict(trainer), tuple(callbacks))
        temporary.set(Brain, "_lightning_defaults", defaults)
        if importlib.util.find_spec("speechbrain") is not None:
            try:
                temporary.enter_context(patch_speechbrain(trainer, callbacks))
            except (ImportError, OSError) as error:
                # A script that needs it will say so itself.
                logger.warning("SpeechBrain is installed but cannot be imported: %s", error)
        run_script(script, words)


def run_script(script: str, words: Sequence[str]) -> None:
    """Runs a script as ``python script words`` would.

    Args:
        script: The script.
        words: Its command line.

    Raises:
        RecipeError: There is no such script, or hyperparameters file, or one of the words
            overrides nothing that is there.
    """
    check_script(script)
    hyperparameters_file(words)
    with TemporaryAttributes() as temporary:
        temporary.set(OwnTrainer, "may_launch", False)
        temporary.set(sys, "argv", [script, *words])
        # Python puts the script's folder there, instead of the caller's.
        temporary.set(sys, "path", [str(Path(script).resolve().parent), *sys.path[1:]])
        try:
            runpy.run_path(script, run_name="__main__")
        except KeyError as error:
            # HyperPyYAML raises it for --name=value, and its class says nothing more.
            if str(error.args[0]).startswith("Override"):
                raise RecipeError(f"{error.args[0]}; {OVERRIDES}") from error
            raise


def _load_trainer_file(path: str) -> dict[str, Any]:
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
