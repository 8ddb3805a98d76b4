"""``brain-lightning``: finds the command, and turns a user's mistake into one line."""

from __future__ import annotations

import importlib
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence

from .exit_status import EXPLANATION, MISTAKE

DESCRIPTION = "SpeechBrain recipes on PyTorch Lightning's Trainer, not one line edited."
# Each is a file of this folder, loaded when it is chosen: `--help` need not wait for torch.
COMMANDS = {
    "run": "run a recipe, its Brains on a Trainer",
    "verify": "run it on SpeechBrain's loop too, and compare",
    "preflight": "try its longest batches, and what memory they take",
    "tune": "search a learning rate or a batch size for it",
    "doctor": "read its script, and say what works with it",
    "port": "write its port: imports, classes, YAML",
    "convert": "a checkpoint for SpeechBrain, Lightning or inference",
}
EXAMPLES = """\
examples:
  brain-lightning run train.py hparams.yaml --lr=0.01 --trainer.max_steps=1000
  brain-lightning run train.py hparams.yaml --trainer.devices=2 --trainer=callbacks.yaml
  brain-lightning verify train.py hparams.yaml --steps=20
  brain-lightning preflight train.py hparams.yaml --batch_size=16
  brain-lightning tune train.py hparams.yaml lr --output=lr.png
  brain-lightning doctor train.py
  brain-lightning port train.py hparams.yaml --verify
  brain-lightning convert results/save last.ckpt --min_key=WER

`brain-lightning run --help` lists run options, `brain-lightning run --trainer.help`
the arguments of the Trainer.

"""
TRACEBACK = "--debug-traceback"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The words of the command line; ``sys.argv[1:]`` if not given.

    Returns:
        The exit status, see ``exit_status.py``.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    chosen = _parser().parse_args(words[:1] or ["--help"])
    command = importlib.import_module(f".{chosen.command}", __package__)
    try:
        status: int = command.main(chosen.parser, words[1:])
    except _mistakes() as error:
        if TRACEBACK in words:
            raise
        print(f"brain-lightning: error: {error}", file=sys.stderr)  # noqa: T201
        return MISTAKE
    return status


def _parser() -> ArgumentParser:
    """Knows the commands, each with a parser to which its file adds the options."""
    parser = ArgumentParser(
        "brain-lightning", "%(prog)s COMMAND ...", DESCRIPTION, EXAMPLES + EXPLANATION,
        formatter_class=RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", prog=parser.prog, required=True
    )
    for name, summary in COMMANDS.items():
        # No abbreviations: an override of the recipe may begin as one of our options does.
        command = commands.add_parser(
            name, help=summary, epilog=EXPLANATION, allow_abbrev=False,
            formatter_class=RawDescriptionHelpFormatter,
        )  # fmt: skip
        help_text = "show a traceback for every error"
        command.add_argument(TRACEBACK, action="store_true", help=help_text)
        command.set_defaults(parser=command)
    return parser


def _mistakes() -> tuple[type[Exception], ...]:
    """A user's mistakes; anything else has a traceback."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from brain_lightning import errors

    return (
        errors.RunOptionError, errors.UnsupportedError, errors.BrainTypeError,
        errors.RecipeError, errors.CheckpointError, errors.CheckpointSaveError,
        errors.PreflightError,
        MisconfigurationException,
    )  # fmt: skip
