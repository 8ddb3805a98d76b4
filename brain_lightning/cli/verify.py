"""Proof of equality: a recipe on SpeechBrain's own loop and on a Trainer, compared."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from brain_lightning.errors import RecipeError

from .verify_comparison import Comparison

SIDES = ("speechbrain", "trainer")
# Lines of a recipe's own output to show where it fails.
TAIL = 15


def verify(
    script: str, words: Sequence[str], steps: int, trainer: Mapping[str, Any]
) -> Comparison:
    """Runs a recipe through both loops from the same seed.

    Each side has a process, and an output folder, of its own. After ``steps``
    training batches a Brain ends its epoch as in debug mode, with a validation of
    no more batches.

    Args:
        script: The script, on SpeechBrain's Brain.
        words: Its command line.
        steps: Training batches of each Brain; 0 for all of them.
        trainer: Arguments of the Trainer.

    Returns:
        What both did, and where they differ first.

    Raises:
        RecipeError: SpeechBrain is not installed, or the recipe fails on its own loop.
    """
    if importlib.util.find_spec("speechbrain") is None:
        raise RecipeError("verify needs SpeechBrain: pip install speechbrain")
    if not Path(script).is_file():
        raise RecipeError(f"there is no script {script!r} here, in {Path.cwd()}")
    task = {"script": script, "steps": steps, "trainer": dict(trainer)}
    with tempfile.TemporaryDirectory(prefix="brain_lightning_verify_") as folder:
        sides = [_run_side({**task, "side": side}, words, Path(folder)) for side in SIDES]
    return Comparison(*sides)


def _run_side(
    task: Mapping[str, Any], words: Sequence[str], folder: Path
) -> list[dict[str, Any]]:
    out = folder / f"{task['side']}.json"
    words = _with_output_folder(words, folder / task["side"])
    result = subprocess.run(  # noqa: S603  the user's own script
        [sys.executable, "-m", "brain_lightning.cli.verify_recorder",
         json.dumps({**task, "words": words, "out": str(out)})],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    events = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
    if not any(event["kind"] == "loss" for event in events):
        tail = "\n".join(result.stdout.splitlines()[-TAIL:])
        raise RecipeError(f"no batch was run on the side of {task['side']}:\n{tail}")
    return events


def _with_output_folder(words: Sequence[str], folder: Path) -> list[str]:
    """Neither side may find the other's checkpoints."""
    files = [word for word in words[:1] if Path(word).is_file()]
    if not any(
        re.search(r"^output_folder\s*:", Path(name).read_text(encoding="utf-8"), re.MULTILINE)
        for name in files
    ):
        return list(words)
    return [*_without_option(words, "--output_folder"), f"--output_folder={folder}"]


def _without_option(words: Sequence[str], option: str) -> Iterator[str]:
    remaining = iter(words)
    for word in remaining:
        if word == option:
            next(remaining, None)
        elif not word.startswith(f"{option}="):
            yield word
