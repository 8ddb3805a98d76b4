"""Parses a recipe's command line: run options, Trainer arguments, YAML overrides."""

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
    """The parsed command line."""

    hparams_file: str
    run_opts: RunOptions
    overrides: str


def parse_arguments(arg_list: Sequence[str] | None = None) -> Arguments:
    """Parses a recipe's command line, as ``speechbrain.parse_arguments`` does.

    ``--a=b`` and ``--a b`` are the same. A flag is given as ``--debug`` or ``--debug=true``.
    ``--trainer.NAME=VALUE`` sets an argument of Lightning's Trainer; its value is parsed as
    YAML. Any other name that is not a run option is an override of the YAML file;
    ``--section.key=value`` overrides one key of a section.

    Args:
        arg_list: The words of the command line. Default: ``sys.argv[1:]``.

    Returns:
        The path of the hyperparameters file, the run options, and the overrides as YAML
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
    """Removes arguments of launchers, which are read from the environment instead.

    ``torch.distributed.launch`` appends ``--local-rank=0``. SpeechBrain 0.5 needed
    ``--distributed_launch`` if a launcher started the script.
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
                logger.warning(
                    "--distributed_launch has no effect. Start the script with torchrun."
                )
        elif not (name in LOCAL_RANKS and value == os.environ.get("LOCAL_RANK")):
            rest.append(word)
    return rest


def _parser() -> ArgumentParser:
    # With SUPPRESS, the parsed result has only the options that were given.
    parser = ArgumentParser(
        description="Run a SpeechBrain experiment.",
        epilog=f"{TRAINER_HELP} lists the arguments of Lightning's Trainer.",
        allow_abbrev=False,
    )
    parser.add_argument("param_file", help="Hyperparameters file in HyperPyYAML format.")
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
    """Replaces ``--debug=true`` by ``--debug`` and removes ``--debug=false``."""
    flags = {f"--{n}" for n, hint in get_type_hints(RunOptions).items() if hint is bool}
    expanded = []
    for word in words:
        name, has_value, value = word.partition("=")
        if name not in flags or not has_value:
            expanded.append(word)
            continue
        truth = _from_yaml(name, value)
        if not isinstance(truth, bool):
            raise RunOptionError(
                f"{name}={value}: the value of a flag must be true or false. Use {name} or "
                f"{name}=true."
            )
        if truth:
            expanded.append(name)
    return expanded


def split_trainer(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Takes ``--trainer.devices=2`` and ``--trainer.devices 2`` out of a command line.

    Args:
        words: The words of the command line.

    Returns:
        The Trainer arguments by name, and the remaining words.

    Raises:
        RunOptionError: An argument has no value, or its value is not valid YAML.
        SystemExit: ``--trainer.help`` is given. Its text has been printed.
    """
    if TRAINER_HELP in words:
        # Imported here, because parsing a command line does not need Lightning.
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
            raise RunOptionError(f"{word} needs a value, as in --trainer.devices=2.")
        trainer[name] = _from_yaml(word, value)
    return trainer, rest


def _from_yaml(word: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RunOptionError(f"{word}: {value!r} is not valid YAML: {error}") from error
