"""``brain-lightning preflight``: a recipe's longest batches, tried without training."""

from __future__ import annotations

import logging
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from typing import Any

from brain_lightning.errors import PreflightError, RecipeError
from brain_lightning.trials.preflight import PreflightAlone

from .run import in_processes
from .script import parse_run, run_recipe

logger = logging.getLogger(__name__)


def main(parser: ArgumentParser, words: list[str]) -> int:
    """Tries the longest batches of a recipe.

    Args:
        parser: The parser of this command.
        words: What follows the command.

    Returns:
        The exit status.
    """
    parser.usage = (
        "%(prog)s SCRIPT [HPARAMS] [--override=value] [--trainer.X=Y] [--trainer=FILE]"
    )
    parser.description = (
        "Runs a SpeechBrain recipe until it trains or evaluates, and there, on a copy of its "
        "state, the longest batches of each set: forward, backward and step. Says what memory "
        "and how many seconds each takes, or which one there is no memory for. Nothing is "
        "trained and nothing is saved; options are those of brain-lightning run."
    )
    _, script, rest, trainer = parse_run(parser, words)
    return in_processes(
        ["preflight", *words], script, rest, trainer, lambda: _try(script, rest, trainer)
    )


def _try(script: str, words: Sequence[str], trainer: Mapping[str, Any]) -> None:
    alone = PreflightAlone()
    try:
        run_recipe(script, words, trainer, [alone])
    except PreflightError:
        raise
    except Exception as error:
        if alone.is_trying or not alone.tried:
            raise
        logger.warning(
            "After its fit was tried the script ended with %s: %s. Nothing was trained, which "
            "it may need: what it evaluates later was not tried.",
            type(error).__name__,
            str(error).rstrip(". "),
        )
    if not alone.tried:
        raise RecipeError(f"nothing was tried: {script} has trained and evaluated nothing")
