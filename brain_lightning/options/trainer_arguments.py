"""The arguments of Lightning's Trainer: which there are, and what each does with a Brain."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping
from functools import cache

from lightning.pytorch import Trainer

from .run_options import check_names, documented

# Of a terminal, by default.
WIDTH = 80
INTRODUCTION = """\
Arguments of Lightning's Trainer, --trainer.NAME=VALUE; the value is YAML, and what follows
NAME here is the default. A line that begins with '>' says what is different with a Brain."""
# Where an argument does something else, or more, than Lightning documents; each is tested
# in tests/callback/test_reconcile.py.
WITH_A_BRAIN = {
    "accelerator": "brain.fit follows the run option device",
    "accumulate_grad_batches": "translated into grad_accumulation_factor; an incomplete last "
    "window makes an update, where the run option drops it",
    "devices": "brain.fit takes 1, and brain-lightning run starts as many processes as asked",
    "enable_checkpointing": "off in brain.fit, unless a callback saves checkpoints",
    "enable_model_summary": "off in brain.fit, unless asked for",
    "enable_progress_bar": "off in brain.fit, where the Brain's own bar is shown (--progress)",
    "gradient_clip_val": "translated into max_grad_norm: each optimizer on its own",
    "inference_mode": "translated into torch.no_grad",
    "logger": "off in brain.fit, unless asked for",
    "max_epochs": "no limit in brain.fit; the epoch counter ends the run too, whichever comes "
    "first",
    "max_steps": "counts updates; the run ends after the epoch's stage hooks, validation "
    "included",
    "max_time": "the run ends after the epoch's stage hooks, validation included",
    "num_sanity_val_steps": "switched off: recipes set up in TRAIN what VALID reads",
    "precision": "mixed precisions are translated into the run options precision and "
    "eval_precision",
    "strategy": "one device, ddp or fsdp2; others are refused before training",
    "use_distributed_sampler": "holds for loaders that the Trainer is given; datasets that "
    "brain.fit makes loaders for are shared out as in SpeechBrain",
}


def check_trainer_arguments(names: Iterable[str]) -> None:
    """Refuses what no Trainer understands.

    Args:
        names: Names of arguments.

    Raises:
        RunOptionError: One is unknown.
    """
    check_names("Trainer argument", names, list(_parameters()))


def trainer_help() -> str:
    """What ``--trainer.help`` shows.

    Returns:
        Every argument with its default, Lightning's description of it in one sentence,
        and what is different with a Brain.
    """
    texts = documented(Trainer.__init__, "Args")
    lines = textwrap.wrap(INTRODUCTION, WIDTH)
    for name, parameter in _parameters().items():
        text = texts.get(name, "")
        # Many have None for a default that only the documentation gives.
        default = re.search(r"Default: ``(.+?)``", text)
        lines += ["", f"--trainer.{name}={default[1] if default else parameter.default}"]
        lines += _indented(_first_sentence(text), "    ")
        lines += _indented(WITH_A_BRAIN.get(name, ""), "  > ")
    return "\n".join(lines)


@cache
def _parameters() -> Mapping[str, inspect.Parameter]:
    return inspect.signature(Trainer).parameters


def _indented(text: str, first: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent="    ")


def _first_sentence(text: str) -> str:
    plain = re.sub(r":\w+:`~?([^`]+)`|``?", r"\1", " ".join(text.split()))
    return re.split(r"(?<=[a-z)\]])\.(?= [A-Z]|$)", plain)[0] + "."
