"""``brain-lightning verify``: a recipe on SpeechBrain's loop and on a Trainer's, compared."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from brain_lightning.errors import RecipeError
from brain_lightning.options.parse_arguments import split_trainer
from brain_lightning.verify.comparison import Comparison
from brain_lightning.verify.evidence import Evidence

from .script import check_script, parse_command, with_output_folder

# Lines of the recipe's output to show where it fails.
TAIL = 15
# Events of which any shows that a batch was run; a loop of the recipe's own may have but one.
OF_BATCHES = ("loss", "objective", "weights")


def main(parser: ArgumentParser, words: list[str]) -> int:
    """Verifies a recipe, and prints what both sides did.

    Args:
        parser: The parser of this command.
        words: What follows the command.

    Returns:
        The exit status: 0 where everything is equal, the recipe does not fail, and a Trainer
            ran what is compared.
    """
    parser.usage = (
        "%(prog)s SCRIPT [HPARAMS] [--override=value] [--steps=N] [--json] [--trainer.X=Y]"
    )
    parser.description = (
        "Runs a recipe through SpeechBrain's loop and through a Trainer's, from the same "
        "seed, and compares hooks, losses, learning rates, gradients and weights. The exit "
        "status is 0 only where everything is equal, the recipe does not fail, and a Trainer "
        "ran one of them."
    )
    parser.add_argument(
        "--steps", type=int, default=10, metavar="N",
        help="training batches of each Brain (default: %(default)s); 0: all of them",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    trainer, rest = split_trainer(words)
    options, script, rest = parse_command(parser, rest)
    comparison = verify(script, rest, options.steps, trainer)
    print(comparison.as_json() if options.json else comparison.as_text())  # noqa: T201
    return 0 if comparison.verified else 1


def verify(
    script: str,
    words: Sequence[str],
    steps: int,
    trainer: Mapping[str, Any],
    ported: tuple[str, Sequence[str]] | None = None,
) -> Comparison:
    """Runs a recipe through both loops from the same seed.

    Each side has its own process and its own output folder. After ``steps`` training batches a
    Brain ends its epoch as in debug mode, with a validation of as many batches at most.

    Args:
        script: The script, on SpeechBrain's Brain.
        words: Its command line.
        steps: Training batches of each Brain; 0 for all of them.
        trainer: Arguments of the Trainer.
        ported: The script on our Brain and its command line, to run in the place of this one
            on the Trainer.

    Returns:
        What both did, and where they differ first.

    Raises:
        RecipeError: SpeechBrain is not installed, or the recipe fails on its own loop.
    """
    if importlib.util.find_spec("speechbrain") is None:
        raise RecipeError("verify needs SpeechBrain: pip install speechbrain")
    check_script(script)
    task = {"script": script, "words": words, "steps": steps, "trainer": dict(trainer)}
    runs = {"speechbrain": task, "trainer": task}
    if ported is not None:
        runs = {
            "speechbrain": task,
            "ported": {**task, "script": ported[0], "words": ported[1]},
        }
    with tempfile.TemporaryDirectory(prefix="brain_lightning_verify_") as folder:
        sides = [_run_side(side, each, Path(folder)) for side, each in runs.items()]
    theirs, ours = sides
    return Comparison(theirs["events"], ours["events"], Evidence.of(ours))


def _run_side(side: str, task: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    out = folder / f"{side}.json"
    words = with_output_folder(task["words"], folder / side)
    result = subprocess.run(  # noqa: S603  the user's own script
        [sys.executable, "-m", "brain_lightning.cli.verify_recorder",
         json.dumps({**task, "side": side, "words": words, "out": str(out)})],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    found: dict[str, Any] = {"events": []}
    if out.is_file():
        found = json.loads(out.read_text(encoding="utf-8"))
    if not any(event["kind"] in OF_BATCHES for event in found["events"]):
        tail = "\n".join(result.stdout.splitlines()[-TAIL:])
        raise RecipeError(f"no batch was run on the side of {side}:\n{tail}")
    return found
