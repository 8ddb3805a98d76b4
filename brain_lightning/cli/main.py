"""``brain-lightning``: finds the command, and reports a user's mistake in one line."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import shutil
import sys
import textwrap
from argparse import Action, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Any

DESCRIPTION = "Runs unmodified SpeechBrain recipes on PyTorch Lightning's Trainer."
# Each command is a file of this folder. It is imported when it is called, so that `--help`
# does not wait for torch.
COMMANDS = {
    "run": "run a recipe with its Brains on a Trainer",
    "verify": "run a recipe on SpeechBrain's loop and on a Trainer, and compare the two",
    "preflight": "run the longest batches of a recipe, and report their memory use",
    "tune": "search for a learning rate or a batch size for a recipe",
    "doctor": "read a recipe's source, and report what works with it",
    "port": "port a recipe to brain_lightning: its imports, classes and YAML files",
    "convert": "convert a checkpoint for SpeechBrain, Lightning or inference",
}
EXAMPLES = """\
examples:
  brain-lightning run train.py hparams.yaml --lr=0.01 --trainer.max_steps=1000
  brain-lightning run train.py hparams.yaml --trainer.devices=2 --trainer=callbacks.yaml
  brain-lightning verify train.py hparams.yaml --steps=20
  brain-lightning preflight train.py hparams.yaml --batch_size=16
  brain-lightning tune train.py hparams.yaml lr --output=lr.png
  brain-lightning doctor train.py hparams.yaml
  brain-lightning port train.py hparams.yaml --verify
  brain-lightning convert results/save last.ckpt --min_key=WER

`brain-lightning run --help` lists the run options.
`brain-lightning run --trainer.help` lists the Trainer arguments.

"""
EXIT_STATUS = """\
exit status:
  0    success
  1    verify did not succeed, port was not complete, or the recipe raised an
       error, which is shown with its traceback
  2    a mistake in the command line, the run options or the files; or preflight
       ran out of memory
  130  interrupted by Ctrl-C
  143  ended by SIGTERM, after saving what could be saved
  If the script calls sys.exit(n), the status is n. If several processes were started,
  it is the status of the process that failed first.
"""
MISTAKE = 2
TRACEBACK = "--debug-traceback"
# Packages whose versions a bug report needs.
PACKAGES = ("torch", "lightning", "speechbrain")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Words of the command line. Default: ``sys.argv[1:]``.

    Returns:
        The exit status, as ``EXIT_STATUS`` lists it.
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


def versions() -> str:
    """Returns the versions that a bug report needs, one in a line.

    They are read from the metadata of the installed packages: importing torch takes seconds.
    """
    return "\n".join(
        [
            f"brain-lightning {_version('brain_lightning')}",
            f"Python {platform.python_version()} on {platform.platform()}",
            *(f"{package} {_version(package)}" for package in PACKAGES),
        ]
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


class _ShowVersions(Action):
    """Prints the versions and exits. They are looked up only if the option is given."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{**arguments, "nargs": 0})

    def __call__(self, parser: ArgumentParser, *_: object) -> None:
        print(versions())  # noqa: T201
        parser.exit()


class _Parser(ArgumentParser):
    """Wraps usage and description. The formatter keeps line breaks, for the epilog."""

    def format_help(self) -> str:
        width = shutil.get_terminal_size().columns - len("usage: ")
        indent = " " * len("usage: ")
        options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
        usage = (self.usage or "").replace("%(prog)s", self.prog)
        self.usage = textwrap.fill(usage, width, subsequent_indent=indent, **options)
        self.description = textwrap.fill(self.description or "", width, **options)
        return super().format_help()


def _parser() -> ArgumentParser:
    """Creates the parser, and one parser for each command, to which its file adds options."""
    parser = _Parser(
        "brain-lightning", "%(prog)s COMMAND ...", DESCRIPTION, EXAMPLES + EXIT_STATUS,
        formatter_class=RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "-V", "--version", action=_ShowVersions,
        help="show the versions of brain-lightning, Python, torch, lightning and speechbrain",
    )  # fmt: skip
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", prog=parser.prog, required=True
    )
    for name, summary in COMMANDS.items():
        # No abbreviations: the prefix of an option may be the name of a recipe's override.
        command = commands.add_parser(
            name, help=summary, epilog=EXIT_STATUS, allow_abbrev=False,
            formatter_class=RawDescriptionHelpFormatter,
        )  # fmt: skip
        help_text = "show a traceback for every error"
        command.add_argument(TRACEBACK, action="store_true", help=help_text)
        command.set_defaults(parser=command)
    return parser


def _mistakes() -> tuple[type[Exception], ...]:
    """Returns the exceptions that are a user's mistakes. Others are shown with a traceback."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from brain_lightning import errors

    return (
        errors.RunOptionError, errors.UnsupportedError, errors.BrainTypeError,
        errors.RecipeError, errors.CheckpointError, errors.CheckpointSaveError,
        errors.PreflightError,
        MisconfigurationException,
    )  # fmt: skip
