"""``brain-lightning preflight``: runs the longest batches of a recipe without training."""

from __future__ import annotations

import logging
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from typing import Any

from brain_lightning.errors import RecipeError
from brain_lightning.trials.preflight import PreflightAlone

from .processes import run_in_processes
from .script import parse_run, run_recipe, temporary_output

logger = logging.getLogger(__name__)


def main(parser: ArgumentParser, words: list[str]) -> int:
    """Runs the longest batches of a recipe.

    Args:
        parser: Parser of this command.
        words: Command line after the command.

    Returns:
        The exit status.
    """
    parser.usage = (
        "%(prog)s SCRIPT [HPARAMS] [--override=value] [--trainer.X=Y] [--trainer=FILE]"
    )
    parser.description = (
        "Runs a SpeechBrain recipe until it trains or evaluates. Then runs the longest "
        "batches of each set on a snapshot of the Brain: forward, backward and optimizer "
        "step. Reports the memory and the seconds of each batch, or the batch that ran out of "
        "memory. Nothing is trained and no checkpoint is saved. The recipe writes to a "
        "temporary output_folder, unless --output_folder is given. Accepts the run options of "
        "`brain-lightning run`."
    )
    _, script, rest, trainer = parse_run(parser, words)
    with temporary_output(parser.prog, rest) as redirected:
        # The processes that this one starts write to the same folder.
        added = redirected[len(rest) :]
        return run_in_processes(
            ["preflight", *words, *added], script, redirected, trainer,
            lambda: _try(script, redirected, trainer),
        )  # fmt: skip


def _try(script: str, words: Sequence[str], trainer: Mapping[str, Any]) -> None:
    alone = PreflightAlone()
    try:
        run_recipe(script, words, trainer, [alone])
    except Exception as error:
        if not alone.ignores(error):
            raise
        logger.warning(
            "After the preflight of fit, the script ended with %s: %s. It may need results of "
            "a training, and preflight trains nothing. Later evaluations were not tried.",
            type(error).__name__,
            str(error).rstrip(". "),
        )
    if not alone.tried:
        raise RecipeError(f"nothing was tried: {script} called neither fit nor evaluate")
