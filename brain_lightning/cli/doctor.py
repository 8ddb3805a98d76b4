"""``brain-lightning doctor``: reports what works with a recipe."""

from __future__ import annotations

import dataclasses
import inspect
import json
import textwrap
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import Trainer

from brain_lightning.callback.unsupported import REFUSED_WITH_SHARDS
from brain_lightning.doctor.report import BrainReport, examine
from brain_lightning.fsdp2.strategy import NAME

from .script import hyperparameters_file, parse_command

WIDTH = 100
REFUSED_STRATEGIES = "fsdp, deepspeed, model_parallel, ddp_spawn, ddp_notebook"


def main(parser: ArgumentParser, words: list[str]) -> int:
    """Examines a recipe, and prints the report.

    Args:
        parser: The parser of this command.
        words: What follows the command.

    Returns:
        The exit status.
    """
    parser.usage = "%(prog)s SCRIPT [HPARAMS] [--override=value] [--json] [--trainer.X=Y]"
    parser.description = (
        "Reads a recipe's script, without running it, and says what works with it. HPARAMS is "
        "read for Brains that it names, and for what is in modules; what follows is for the "
        "other commands, and is not read."
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options, script, rest = parse_command(parser, words)
    report = examine(script, hyperparameters_file(rest))
    if options.json:
        print(json.dumps(dataclasses.asdict(report), indent=1))  # noqa: T201
    else:
        texts = [_text(script, brain) for brain in report.brains]
        texts += [
            f"{script}:{line}: {name} is in no file that can be found here; if its package is "
            "in another folder, name that folder in PYTHONPATH"
            for name, line in report.not_found.items()
        ]
        texts += [
            f"{script}:{line}: {name} is not examined, for its base is in no file"
            for name, line in report.not_examined.items()
        ]
        print("\n\n".join(texts) or f"{script}: no subclass of Brain")  # noqa: T201
    return 0


def _text(script: str, brain: BrainReport) -> str:
    own = brain.file == Path(script).name
    file = script if own else brain.file
    lines = [f"{file}:{brain.line}: {brain.name}, a subclass of {brain.base}"]
    for head, text in _facts(brain, Path(script).name):
        # Names are to be copied, and found: none is broken.
        lines += textwrap.wrap(
            text, WIDTH, initial_indent=f"  {head:<12}", subsequent_indent=" " * 14,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    return "\n".join(lines)


def _facts(brain: BrainReport, script: str) -> Iterator[tuple[str, str]]:
    """What is to be changed first, and at the end what that was found by."""
    yield "updates", f"{brain.updates}: {brain.why}"
    for remark in brain.remarks:
        at = f"line {remark.line}" if remark.file == script else f"{remark.file}:{remark.line}"
        yield "change", f"{at}: {remark.about}: {remark.says}"
    yield "strategies", f"safe: {'; '.join(brain.strategies) or 'none'}"
    yield "", f"refused: {REFUSED_STRATEGIES}"
    others = [n for n in inspect.signature(Trainer).parameters if n not in brain.arguments]
    if brain.arguments:
        yield "arguments", f"safe: all of Lightning's but {', '.join(others)}"
        where = "" if "callbacks" in brain.arguments else " outside the recipe's own loop"
        refused = "; ".join(brain.callbacks_refused)
        yield "callbacks", f"safe{where}: all of Lightning's but {refused}"
        if any(text.startswith(NAME) for text in brain.strategies):
            yield "", f"with {NAME} also refused: {'; '.join(REFUSED_WITH_SHARDS)}"
    else:
        yield "arguments", "safe: none"
    yield "overrides", ", ".join(f"{n} ({at})" for n, at in brain.overrides.items())
    for name, locations in brain.uses.items():
        yield "uses", f"{name}: {', '.join(locations)}"
