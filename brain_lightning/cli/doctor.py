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

from brain_lightning.callback.unsupported import UNSUPPORTED_WITH_SHARDS
from brain_lightning.doctor.remark import ARGUMENTS
from brain_lightning.doctor.report import BrainReport, examine
from brain_lightning.fsdp2.strategy import NAME
from brain_lightning.options.trainer_arguments import WITH_A_BRAIN
from brain_lightning.port.local_modules import IGNORES_COMMAND_LINE, ignores_command_line

from .script import hyperparameters_file, parse_command

WIDTH = 100
UNSUPPORTED_STRATEGIES = "fsdp, deepspeed, model_parallel, ddp_spawn, ddp_notebook"
# Trainer arguments that are not in BrainReport.arguments of any Brain, and what they do.
OTHER_ARGUMENTS = {
    "strategy": "only the strategies above",
    "plugins": "cluster environments, CheckpointIO and mixed precision; others are not tested",
    "sync_batchnorm": "not needed with ddp on GPUs, which always converts BatchNorm, as in "
    "SpeechBrain; with ddp on CPUs an error if a module has a BatchNorm",
    **{name: WITH_A_BRAIN[name] for name in (
        "num_sanity_val_steps", "inference_mode", "use_distributed_sampler",
        "enable_model_summary",
    )},
}  # fmt: skip
# Trainer arguments that work, and that no remark of doctor limits.
NEVER_LIMITED = ("limit_predict_batches", "default_root_dir")


def main(parser: ArgumentParser, words: list[str]) -> int:
    """Examines a recipe's source, and prints a report.

    Args:
        parser: Parser of this command.
        words: Command line after the command.

    Returns:
        The exit status.
    """
    parser.usage = "%(prog)s SCRIPT [HPARAMS] [--override=value] [--json] [--trainer.X=Y]"
    parser.description = (
        "Reads a recipe's source without running it. Reports what to change, and which "
        "strategies, Trainer arguments and callbacks work with it. HPARAMS is read for the "
        "Brains that it names and for the entries of modules. Overrides and --trainer.X=Y are "
        "accepted, so that a command line of `run` can be reused, and are ignored."
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options, script, rest = parse_command(parser, words)
    report = examine(script, hyperparameters_file(rest))
    ignores = bool(report.brains) and ignores_command_line(Path(script))
    if options.json:
        shown = {**dataclasses.asdict(report), "ignores_command_line": ignores}
        print(json.dumps(shown, indent=1))  # noqa: T201
    else:
        texts = [_text(script, brain) for brain in report.brains]
        texts += [
            f"{script}:{line}: no file with {name} was found. If its package is in another "
            "folder, add that folder to PYTHONPATH."
            for name, line in report.not_found.items()
        ]
        texts += [
            f"{script}:{line}: {name} was not examined, because no file with its base class "
            "was found."
            for name, line in report.not_examined.items()
        ]
        if ignores:
            texts.append(_wrapped(f"{script}: {IGNORES_COMMAND_LINE}", "", "  "))
        print("\n\n".join(texts) or f"{script}: no subclass of Brain was found")  # noqa: T201
    return 0


def _text(script: str, brain: BrainReport) -> str:
    own = brain.file == Path(script).name
    file = script if own else brain.file
    lines = [f"{file}:{brain.line}: {brain.name}, a subclass of {brain.base}"]
    for head, text in _facts(brain, Path(script).name):
        lines.append(_wrapped(text, f"  {head:<12}", " " * 14))
    return "\n".join(lines)


def _wrapped(text: str, first: str, rest: str) -> str:
    # No name is broken across lines, so that it can be copied and searched for.
    return textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=rest,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _facts(brain: BrainReport, script: str) -> Iterator[tuple[str, str]]:
    """Yields heads and texts: first what to change, last the evidence in the source."""
    yield "updates", f"{brain.updates}: {brain.why}"
    for remark in brain.remarks:
        at = f"line {remark.line}" if remark.file == script else f"{remark.file}:{remark.line}"
        yield "change", f"{at}: {remark.about}: {remark.says}"
    for number, strategy in enumerate(brain.strategies or ["none"]):
        yield "" if number else "strategies", f"supported: {strategy}"
    yield "", f"not supported: {UNSUPPORTED_STRATEGIES}"
    if brain.arguments:
        yield "arguments", "supported: all of Lightning's, with these exceptions"
        if limited := [name for name in ARGUMENTS if name not in brain.arguments]:
            yield "", f"no effect, or an error (see change): {', '.join(limited)}"
        yield from (("", f"{name}: {text}") for name, text in OTHER_ARGUMENTS.items())
        known = {*ARGUMENTS, *OTHER_ARGUMENTS, *NEVER_LIMITED}
        rest = [name for name in inspect.signature(Trainer).parameters if name not in known]
        yield "", f"not tested: {', '.join(rest)}"
        yield "", "brain-lightning run --trainer.help describes each argument"
        where = "" if "callbacks" in brain.arguments else " outside the custom loop"
        exceptions = "; ".join(brain.callbacks_refused)
        but = f" except {exceptions}" if exceptions else ""
        yield "callbacks", f"supported{where}: all of Lightning's{but}"
        if any(text.startswith(NAME) for text in brain.strategies):
            yield "", f"not supported with {NAME}: {'; '.join(UNSUPPORTED_WITH_SHARDS)}"
    else:
        yield "arguments", "supported: none"
    yield "overrides", ", ".join(f"{n} ({at})" for n, at in brain.overrides.items())
    for name, locations in brain.uses.items():
        yield "uses", f"{name}: {', '.join(locations)}"
