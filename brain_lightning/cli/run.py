"""``brain-lightning run``: runs a recipe on a Trainer."""

from __future__ import annotations

import shutil
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from brain_lightning.errors import RunOptionError
from brain_lightning.loggers.curve_plot import CurvePlot
from brain_lightning.loggers.objective import Objective
from brain_lightning.options.parse_arguments import TRAINER_HELP
from brain_lightning.options.run_options import RunOptions
from brain_lightning.protocol import OURS_ALONE

from .processes import run_in_processes
from .script import parse_run, run_recipe

OPTIONS = f"""\
run options:
{{}}

If the script uses SpeechBrain's Brain, set these in the YAML file, as in `preflight: True`:
  {", ".join(OURS_ALONE)}

arguments of Lightning's Trainer:
  --trainer.NAME=VALUE, for example --trainer.max_steps=1000
  {TRAINER_HELP} lists them

Any other --name=value overrides a key of the hyperparameters file, as in SpeechBrain.

"""


def main(parser: ArgumentParser, words: list[str]) -> int:
    """Runs a recipe.

    Args:
        parser: Parser of this command.
        words: Command line after the command.

    Returns:
        The exit status.
    """
    _describe(parser)
    # `--plot` without a file takes no value. Otherwise it would take the script for its file.
    plotted = ["--plot=" if word == "--plot" else word for word in words]
    options, script, rest, trainer = parse_run(parser, plotted)
    objective = _objective(options)
    plot = None if options.plot is None else CurvePlot(options.plot or None)
    callbacks = [each for each in (plot, objective) if each is not None]

    def run() -> None:
        with nullcontext() if objective is None else _reported_at_end(objective):
            run_recipe(script, rest, trainer, callbacks)

    return run_in_processes(["run", *words], script, rest, trainer, run)


def _describe(parser: ArgumentParser) -> None:
    """Adds the options and the help texts of the command."""
    parser.usage = (
        "%(prog)s SCRIPT [HPARAMS] [--override=value] [--trainer.X=Y] [--trainer=FILE] "
        "[--plot[=FILE.png]] [--report=NAME [--report-file=FILE.json]]"
    )
    parser.description = "Runs a SpeechBrain recipe with its Brains on Lightning's Trainer."
    options = RunOptions.on_command_line()
    # At least as wide as the names and half a line of text.
    width = max(shutil.get_terminal_size().columns - 2, 80)
    listed = [
        textwrap.fill(
            text, width, initial_indent=f"  --{name:<38}", subsequent_indent=" " * 42
        )
        for name, text in options.items()
    ]
    parser.epilog = OPTIONS.format("\n".join(listed)) + (parser.epilog or "")
    parser.add_argument(
        "--plot", metavar="=FILE.png", nargs="?",
        help="plot the losses and metrics at the end of each epoch; --plot=FILE.png sets the "
        "file (default: curves.png in the recipe's output_folder)",
    )  # fmt: skip
    parser.add_argument(
        "--report", metavar="NAME[:max]",
        help="as the last line, print the best value of a number that the recipe reports: the "
        "smallest with --report=WER, the largest with --report=ACC:max",
    )  # fmt: skip
    parser.add_argument(
        "--report-file", metavar="FILE.json",
        help="also write the value of --report and its epoch to this file",
    )  # fmt: skip


def _objective(options: Namespace) -> Objective | None:
    if options.report is not None:
        return Objective(options.report, options.report_file)
    if options.report_file is not None:
        raise RunOptionError(
            "--report-file needs --report. Add the number to report, as in --report=WER."
        )
    return None


@contextmanager
def _reported_at_end(objective: Objective) -> Iterator[None]:
    """Reports the objective if the recipe ends without an error, or by ``sys.exit(0)``."""
    try:
        yield
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    objective.report()
