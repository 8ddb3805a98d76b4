"""``brain-lightning doctor``: reports what works with a recipe."""

from __future__ import annotations

import dataclasses
import inspect
import json
import textwrap
from argparse import ArgumentParser
from collections.abc import Iterator

from lightning.pytorch import Trainer

from brain_lightning.doctor.report import BrainReport, examine

from .script import parse_command

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
        "Reads a recipe's script, without running it, and says what works with it. What "
        "follows the script is for the other commands, and is not read."
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options, script, _ = parse_command(parser, words)
    report = examine(script)
    if options.json:
        print(json.dumps(dataclasses.asdict(report), indent=1))  # noqa: T201
    else:
        texts = [_text(script, brain) for brain in report.brains]
        print("\n\n".join(texts) or f"{script}: no subclass of Brain")  # noqa: T201
    return 0


def _text(script: str, brain: BrainReport) -> str:
    lines = [f"{script}:{brain.line}: {brain.name}, a subclass of {brain.base}"]
    for head, text in _facts(brain):
        # Names are to be copied, and found: none is broken.
        lines += textwrap.wrap(
            text, WIDTH, initial_indent=f"  {head:<12}", subsequent_indent=" " * 14,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    return "\n".join(lines)


def _facts(brain: BrainReport) -> Iterator[tuple[str, str]]:
    yield "updates", f"{brain.updates}: {brain.why}"
    yield "overrides", ", ".join(f"{n} ({at})" for n, at in brain.overrides.items())
    for name, locations in brain.uses.items():
        yield "uses", f"{name}: {', '.join(locations)}"
    yield "strategies", f"safe: {'; '.join(brain.strategies)}"
    yield "", f"refused: {REFUSED_STRATEGIES}"
    others = [n for n in inspect.signature(Trainer).parameters if n not in brain.arguments]
    yield "arguments", f"safe: all of Lightning's but {', '.join(others)}"
    yield "callbacks", f"safe: all of Lightning's but {'; '.join(brain.callbacks_refused)}"
    for remark in brain.remarks:
        yield "change", f"line {remark.line}: {remark.about}: {remark.says}"
