"""Runs a recipe's script, unedited, as ``python script`` would."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hyperpyyaml import load_hyperpyyaml
from lightning.pytorch import Callback

from brain_lightning.brain.brain import Brain
from brain_lightning.brain.patch import patch_speechbrain
from brain_lightning.errors import RecipeError
from brain_lightning.options.trainer_arguments import check_trainer_arguments
from brain_lightning.temporary import TemporaryAttributes

logger = logging.getLogger(__name__)

OVERRIDES = (
    "--name=value overrides what the hyperparameters file has; options and arguments of the "
    "Trainer are listed by brain-lightning run --help and --trainer.help"
)


def script_first(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """Refuses a command line without a script, by the parser's usage.

    Args:
        parser: The parser of the command.
        words: What it did not know.

    Returns:
        ``words``: the script, and its command line.

    Raises:
        SystemExit: The first of them is no script.
    """
    if not words or words[0].startswith("-"):
        parser.error("the script comes first: train.py hparams.yaml")
    return words


def check_script(script: str) -> None:
    """Refuses a script that is not there.

    Args:
        script: The script.

    Raises:
        RecipeError: There is no such file.
    """
    if not Path(script).is_file():
        raise RecipeError(f"there is no script {script!r} here, in {Path.cwd()}")


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
            try:
                stack.enter_context(patch_speechbrain(trainer, callbacks))
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
    file = words[0] if words else ""
    if file.endswith((".yaml", ".yml")) and not Path(file).is_file():
        raise RecipeError(f"there is no hyperparameters file {file!r} here, in {Path.cwd()}")
    with _as_main_program(script, words):
        try:
            runpy.run_path(script, run_name="__main__")
        except KeyError as error:
            # HyperPyYAML raises it for --name=value, and its class says nothing more.
            if str(error.args[0]).startswith("Override"):
                raise RecipeError(f"{error.args[0]}; {OVERRIDES}") from error
            raise


@contextmanager
def _as_main_program(script: str, words: Sequence[str]) -> Iterator[None]:
    """Python puts the script's folder on the path, instead of the caller's."""
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
