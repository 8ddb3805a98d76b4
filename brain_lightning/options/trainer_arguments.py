"""The arguments of Lightning's Trainer, and what each does with a Brain."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping
from functools import cache

from lightning.pytorch import Trainer

from .run_options import check_names, documented

# Default width of a terminal, in columns.
WIDTH = 80
INTRODUCTION = """\
Arguments of Lightning's Trainer. Set them with --trainer.NAME=VALUE. VALUE is parsed as YAML.
The default follows each name. A line that begins with '>' describes what is different with a
Brain."""
# Arguments that do something other, or more, than Lightning documents. Each is tested in
# tests/callback/test_reconcile.py.
WITH_A_BRAIN = {
    "accelerator": "brain.fit uses the run option device",
    "accumulate_grad_batches": "translated into grad_accumulation_factor; an incomplete last "
    "accumulation window makes an optimizer step, whereas the run option drops it",
    "devices": "brain.fit accepts 1; brain-lightning run starts this number of processes",
    "enable_checkpointing": "off by default in brain.fit, unless a callback saves checkpoints",
    "enable_model_summary": "off by default in brain.fit",
    "enable_progress_bar": "off by default in brain.fit, which shows the Brain's own bar "
    "(--progress)",
    "gradient_clip_val": "translated into max_grad_norm; each optimizer is clipped separately",
    "inference_mode": "translated into torch.no_grad",
    "logger": "off by default in brain.fit",
    "max_epochs": "unlimited by default in brain.fit; the run ends at this limit or at the "
    "limit of the epoch counter, whichever comes first",
    "max_steps": "counts optimizer steps; the run ends after the epoch's stage hooks and "
    "validation",
    "max_time": "the run ends after the epoch's stage hooks and validation",
    "num_sanity_val_steps": "off, because recipes initialize in TRAIN what VALID needs",
    "precision": "mixed precisions are translated into the run options precision and "
    "eval_precision",
    "strategy": "one device, ddp or fsdp2; others raise an error before training",
    "use_distributed_sampler": "applies to loaders that are passed to the Trainer; datasets "
    "that are passed to brain.fit are distributed as in SpeechBrain",
}


def check_trainer_arguments(names: Iterable[str]) -> None:
    """Raises an error if a name is not an argument of the Trainer.

    Args:
        names: Names of arguments.

    Raises:
        RunOptionError: A name is not known.
    """
    check_names("Trainer argument", names, list(_parameters()))


def trainer_help() -> str:
    """Returns the text that ``--trainer.help`` shows.

    Returns:
        Every argument with its default, the first sentence of Lightning's description, and
        what is different with a Brain.
    """
    texts = documented(Trainer.__init__, "Args")
    lines = textwrap.wrap(INTRODUCTION, WIDTH)
    for name, parameter in _parameters().items():
        text = texts.get(name, "")
        # The default of many arguments is None in the signature, and only documented.
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
