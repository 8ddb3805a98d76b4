"""The command line, ``brain-lightning``; loads nothing before it knows what to do."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from .exit_status import EXPLANATION

DESCRIPTION = "SpeechBrain recipes on PyTorch Lightning's Trainer, not one line edited."
EXAMPLES = """\
commands:
  run     SCRIPT HPARAMS [overrides]   run a recipe, its Brains on a Trainer
  verify  SCRIPT HPARAMS [overrides]   run it on SpeechBrain's loop too, and compare
  doctor  SCRIPT                       read it, and say what works with it
  convert SRC DST [--min_key=WER]      a checkpoint for SpeechBrain, Lightning or inference

examples:
  brain-lightning run train.py hparams.yaml --lr=0.01 --trainer.max_steps=1000
  brain-lightning run train.py hparams.yaml --trainer.devices=2 --trainer=callbacks.yaml
  brain-lightning verify train.py hparams.yaml --steps=20

`brain-lightning run --help` lists run options, `brain-lightning run --trainer.help`
the arguments of the Trainer.

"""
COMMANDS = ("run", "verify", "doctor", "convert")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The words of the command line; ``sys.argv[1:]`` if not given.

    Returns:
        The exit status, see ``exit_status.py``.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        "brain-lightning",
        usage="%(prog)s COMMAND ...",
        description=DESCRIPTION,
        epilog=EXAMPLES + EXPLANATION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    command = parser.parse_args(words[:1] or ["--help"]).command
    commands = importlib.import_module(".commands", __package__)
    status: int = commands.run_command(command, words[1:])
    return status
