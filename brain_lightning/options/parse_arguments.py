"""A recipe's command line: run options, Trainer arguments, overrides of the YAML file."""

from __future__ import annotations

import logging
import os
import sys
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Sequence
from typing import Any, NamedTuple, get_type_hints

import yaml

from brain_lightning.distributed.communication import is_launched
from brain_lightning.errors import RunOptionError

from .overrides import overrides_to_yaml
from .run_options import CHOICES, RunOptions

logger = logging.getLogger(__name__)

TRAINER_PREFIX = "--trainer."
TRAINER_HELP = f"{TRAINER_PREFIX}help"
LOCAL_RANKS = ("--local-rank", "--local_rank")
TRUTHS = {"true": True, "false": False, "1": True, "0": False}


class Arguments(NamedTuple):
    """What ``parse_arguments`` returns."""

    hparams_file: str
    run_opts: RunOptions
    overrides: str


def parse_arguments(arg_list: Sequence[str] | None = None) -> Arguments:
    """Reads a recipe's command line, as ``speechbrain.parse_arguments``.

    ``--a=b`` and ``--a b`` are the same, and a flag may be given as ``--debug``
    or ``--debug=true``. What names no run option is an override of the YAML
    file, ``--section.key=value`` of one key within a section; what starts with
    ``--trainer.`` is an argument of Lightning's Trainer, its value read as YAML.

    Args:
        arg_list: The words of the command line; ``sys.argv[1:]`` if not given.

    Returns:
        The hyperparameters file, the run options, and the overrides as YAML
        text for ``load_hyperpyyaml``.
    """
    trainer, words = split_trainer(sys.argv[1:] if arg_list is None else arg_list)
    words = _without_launchers(words)
    parsed, rest = _parser().parse_known_args(_expand_flags(words))
    given = vars(parsed)
    hparams_file = given.pop("param_file")
    run_opts = RunOptions(
        **given,
        param_file=hparams_file,
        trainer=trainer,
        overridden_args=frozenset(given) | ({"trainer"} if trainer else set()),
    )
    return Arguments(hparams_file, run_opts, overrides_to_yaml(rest, hparams_file))


def _without_launchers(words: Sequence[str]) -> list[str]:
    """Leaves out what the environment says, too.

    ``torch.distributed.launch`` appends ``--local-rank=0``, and SpeechBrain 0.5 was told of a
    launch by ``--distributed_launch``.
    """
    rest: list[str] = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        name, has_value, value = word.partition("=")
        if name == "--distributed_launch":
            if not has_value and remaining and remaining[0].lower() in TRUTHS:
                value = remaining.pop(0)
            if TRUTHS.get(value.lower(), True) and not is_launched():
                logger.warning("%s has no effect: start the script with torchrun", name)
        elif not (name in LOCAL_RANKS and value == os.environ.get("LOCAL_RANK")):
            rest.append(word)
    return rest


def _parser() -> ArgumentParser:
    # SUPPRESS: what is in the result was given.
    parser = ArgumentParser(
        description="Run a SpeechBrain experiment",
        epilog=f"Arguments of Lightning's Trainer: {TRAINER_HELP} lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("param_file", help="A hyperparameters file in HyperPyYAML.")
    types = get_type_hints(RunOptions)
    for name, help_text in RunOptions.on_command_line().items():
        kind = _argument(name, types[name])
        parser.add_argument(f"--{name}", default=SUPPRESS, help=help_text, **kind)
    return parser


def _argument(name: str, hint: Any) -> dict[str, Any]:
    if hint is bool:
        return {"action": "store_true"}
    if hint == list[str] | None:
        return {"nargs": "*"}
    if name in CHOICES:
        return {"choices": CHOICES[name]}
    return {"type": next(t for t in (int, float, str) if t is hint or hint == t | None)}


def _expand_flags(words: Sequence[str]) -> list[str]:
    """``--debug=true`` becomes ``--debug``, ``--debug=false`` nothing."""
    flags = {f"--{n}" for n, hint in get_type_hints(RunOptions).items() if hint is bool}
    expanded = []
    for word in words:
        name, has_value, value = word.partition("=")
        if name not in flags or not has_value:
            expanded.append(word)
            continue
        truth = _from_yaml(name, value)
        if not isinstance(truth, bool):
            raise RunOptionError(f"{name}={value}: a flag is true or false, or stands alone")
        if truth:
            expanded.append(name)
    return expanded


def split_trainer(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Takes ``--trainer.devices=2`` and ``--trainer.devices 2`` out of a command line.

    Args:
        words: The words of the command line.

    Returns:
        Arguments of the Trainer, and the other words.

    Raises:
        RunOptionError: One has no value, or one that is not YAML.
        SystemExit: ``--trainer.help`` is among them, and was shown.
    """
    if TRAINER_HELP in words:
        # Lightning is needed here, and not for a command line.
        from .trainer_arguments import trainer_help

        print(trainer_help())  # noqa: T201
        raise SystemExit(0)
    trainer: dict[str, Any] = {}
    rest: list[str] = []
    remaining = iter(words)
    for word in remaining:
        if not word.startswith(TRAINER_PREFIX):
            rest.append(word)
            continue
        name, has_value, value = word.removeprefix(TRAINER_PREFIX).partition("=")
        if not has_value:
            value = next(remaining, "")
        if not name or not value or value.startswith("--"):
            raise RunOptionError(f"{word}: give it a value, as in --trainer.devices=2")
        trainer[name] = _from_yaml(word, value)
    return trainer, rest


def _from_yaml(word: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RunOptionError(f"{word}: {value!r} is not YAML: {error}") from error
