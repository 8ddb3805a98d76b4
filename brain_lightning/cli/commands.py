"""The commands of ``brain-lightning``: what each word after it does."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from brain_lightning.errors import (
    BrainTypeError,
    CheckpointError,
    CheckpointSaveError,
    RecipeError,
    RunOptionError,
    UnsupportedError,
)
from brain_lightning.loggers.console import show_information
from brain_lightning.loggers.curve_plot import CurvePlot
from brain_lightning.options.run_options import (
    OURS_ALONE,
    TRAINER_HELP,
    RunOptions,
    split_trainer,
)

from . import convert, doctor, verify
from . import script as recipe
from .exit_status import EXPLANATION, MISTAKE

USERS_MISTAKES = (
    RunOptionError,
    UnsupportedError,
    BrainTypeError,
    RecipeError,
    CheckpointError,
    CheckpointSaveError,
    MisconfigurationException,
)


def run_command(command: str, words: Sequence[str]) -> int:
    """Runs a command.

    Args:
        command: One of ``COMMANDS``.
        words: What follows it on the command line.

    Returns:
        The exit status, see ``cli.main``.
    """
    shows_traceback = "--debug-traceback" in words
    try:
        return COMMANDS[command]([w for w in words if w != "--debug-traceback"])
    except USERS_MISTAKES as error:
        if shows_traceback:
            raise
        print(f"brain-lightning: error: {error}", file=sys.stderr)  # noqa: T201
        return MISTAKE


def _parser(command: str, usage: str, **kwargs: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"brain-lightning {command}",
        usage=f"%(prog)s {usage}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # An override of the recipe may begin as one of our options does.
        allow_abbrev=False,
        **{"epilog": EXPLANATION, **kwargs},
    )
    parser.add_argument(
        "--debug-traceback", action="store_true", help="show a traceback for every error"
    )
    return parser


def _run(words: list[str]) -> int:
    trainer, rest = split_trainer(words)
    parser = _parser(
        "run",
        "SCRIPT [HPARAMS] [--override=value] [--trainer.X=Y] [--trainer=FILE] "
        "[--plot[=FILE.png]]",
        description="Runs a SpeechBrain recipe, its Brains on a Trainer.",
        epilog=_options_help(),
    )
    parser.add_argument(
        "--trainer",
        metavar="FILE",
        help="a HyperPyYAML file with Trainer arguments, callbacks and loggers among them, "
        "its paths in full; --trainer.X=Y outranks it",
    )
    parser.add_argument(
        "--plot", metavar="=FILE.png", nargs="?", const="",
        help="draw curves of losses and metrics at each end of an epoch; --plot=FILE.png "
        "says where (default: curves.png in the recipe's output_folder)",
    )  # fmt: skip
    # By itself it takes no value: what follows may be the script.
    known, rest = parser.parse_known_args(["--plot=" if w == "--plot" else w for w in rest])
    if known.trainer is not None:
        trainer = {**recipe.load_trainer_file(known.trainer), **trainer}
    script, *rest = _script(parser, rest)
    callbacks = [] if known.plot is None else [CurvePlot(known.plot or None)]
    processes = recipe.processes_to_launch(trainer)
    if processes > 1:
        return recipe.launch(processes, ["run", *words, *_backend(rest)])
    recipe.run_recipe(script, rest, trainer, callbacks)
    return 0


def _script(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    if not words or words[0].startswith("-"):
        parser.error("the script comes first: train.py hparams.yaml")
    return words


def _backend(words: Sequence[str]) -> list[str]:
    """SpeechBrain's default, nccl, needs a GPU for each process."""
    chosen = any(word.startswith("--distributed_backend") for word in words)
    on_cpu = "--device=cpu" in words or not torch.cuda.is_available()
    return ["--distributed_backend=gloo"] if on_cpu and not chosen else []


def _options_help() -> str:
    options = [
        f"  --{field.name:<38}{field.metadata['help']}"
        for field in dataclasses.fields(RunOptions)
        if field.metadata.get("on_command_line")
    ]
    return (
        "run options (SpeechBrain's own Brain has none of "
        + ", ".join(f"--{name}" for name in OURS_ALONE)
        + "):\n"
        + "\n".join(options)
        + "\n\n"
        "arguments of Lightning's Trainer:\n"
        f"  --trainer.NAME=VALUE, as --trainer.max_steps=1000; {TRAINER_HELP} lists them\n\n"
        "Any other --name=value overrides the hyperparameters file, as in SpeechBrain.\n\n"
        + EXPLANATION
    )


def _verify(words: list[str]) -> int:
    trainer, rest = split_trainer(words)
    parser = _parser(
        "verify",
        "SCRIPT [HPARAMS] [--override=value] [--steps=N] [--json] [--trainer.X=Y]",
        description="Runs a recipe through SpeechBrain's loop and through a Trainer's, from "
        "the same seed, and compares hooks, losses, learning rates, gradients and weights. "
        "The exit status is 0 only where everything is equal.",
    )
    parser.add_argument(
        "--steps", type=int, default=10, metavar="N",
        help="training batches of each Brain (default: %(default)s); 0: all of them",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    known, rest = parser.parse_known_args(rest)
    script, *rest = _script(parser, rest)
    comparison = verify.verify(script, rest, known.steps, trainer)
    print(comparison.as_json() if known.json else comparison.as_text())  # noqa: T201
    return 0 if comparison.equal else 1


def _doctor(words: list[str]) -> int:
    parser = _parser(
        "doctor",
        "SCRIPT [HPARAMS] [--override=value] [--json] [--trainer.X=Y]",
        description="Reads a recipe's script, without running it, and says what works with "
        "it. What follows the script is for the other commands, and is not read.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    known, rest = parser.parse_known_args(words)
    report = doctor.examine(_script(parser, rest)[0])
    print(report.as_json() if known.json else report.as_text())  # noqa: T201
    return 0


def _convert(words: list[str]) -> int:
    parser = _parser(
        "convert",
        "SRC DST [--hparams=FILE] [--min_key=NAME | --max_key=NAME]",
        description="Turns a CKPT+ directory into a Lightning file (DST is x.ckpt) or a "
        "folder for SpeechBrain's from_hparams (any other name), and a Lightning file into a "
        "CKPT+ directory (DST is CKPT+x).",
    )
    parser.add_argument("source", metavar="SRC", help="a checkpoint, or a folder of them")
    parser.add_argument("target", metavar="DST", help="what to write; it must not be there")
    parser.add_argument("--hparams", metavar="FILE", help="the recipe's hyperparameters")
    best = parser.add_mutually_exclusive_group()
    best.add_argument(
        "--min_key",
        metavar="NAME",
        help="of a folder of checkpoints the one with the lowest NAME in its meta, such as "
        "error (default: the newest)",
    )
    best.add_argument("--max_key", metavar="NAME", help="the one with the highest")
    # Which checkpoint it was, and what is left out; the standard output has the path alone.
    show_information()
    known = parser.parse_args(words)
    written = convert.convert(
        known.source, known.target, known.hparams, known.min_key, known.max_key
    )
    print(written)  # noqa: T201
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": _run,
    "verify": _verify,
    "doctor": _doctor,
    "convert": _convert,
}
