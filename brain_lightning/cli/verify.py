"""``brain-lightning verify``: compares a recipe on SpeechBrain's loop and on a Trainer."""

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

# Number of lines of a recipe's output to show if it fails.
TAIL = 15
# Each of these events proves that a batch was run. A custom loop may have only one of them.
BATCH_EVENTS = ("loss", "objective", "weights")


def main(parser: ArgumentParser, words: list[str]) -> int:
    """Verifies a recipe, and prints the comparison.

    Args:
        parser: Parser of this command.
        words: Command line after the command.

    Returns:
        The exit status: 0 if all events are equal, the recipe raises no error, and a Trainer
            ran its batches.
    """
    parser.usage = (
        "%(prog)s SCRIPT [HPARAMS] [--override=value] [--steps=N] [--json] [--trainer.X=Y]"
    )
    parser.description = (
        "Runs a recipe on SpeechBrain's loop and on a Trainer, from the same seed. Compares "
        "hooks, losses, learning rates, gradients and weights. The exit status is 0 only if "
        "all of them are equal, the recipe raises no error, and a Trainer ran its batches."
    )
    parser.add_argument(
        "--steps", type=int, default=10, metavar="N",
        help="number of training batches of each Brain, 0 for all (default: %(default)s)",
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
    """Runs a recipe on both loops from the same seed.

    Each side has a separate process and output folder. After ``steps`` training batches a
    Brain ends its epoch as in debug mode, with a validation of at most ``steps`` batches.

    Args:
        script: Path of a script that uses SpeechBrain's Brain.
        words: Command line of the script.
        steps: Number of training batches of each Brain, 0 for all.
        trainer: Trainer arguments.
        ported: Ported script and its command line. If given, the Trainer's side runs it
            instead of ``script``.

    Returns:
        The events of both sides, with their first difference.

    Raises:
        RecipeError: SpeechBrain is not installed, one side ran no batch, or the script's Brain
            is brain_lightning's.
    """
    if importlib.util.find_spec("speechbrain") is None:
        raise RecipeError("verify needs SpeechBrain. Run pip install speechbrain.")
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
    if "mistake" in found:
        raise RecipeError(found["mistake"])
    if not any(event["kind"] in BATCH_EVENTS for event in found["events"]):
        tail = "\n".join(result.stdout.splitlines()[-TAIL:])
        raise RecipeError(
            f"the {side} side of verify ran no batch. Its last lines of output:\n{tail}"
        )
    return found
