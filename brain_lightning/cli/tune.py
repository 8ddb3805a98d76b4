"""``brain-lightning tune``: a learning rate or a batch size for a recipe, without training."""

from __future__ import annotations

import importlib.util
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch.loggers.logger import DummyLogger

from brain_lightning.distributed.communication import if_main_process, is_launched
from brain_lightning.errors import RecipeError, RunOptionError, UnsupportedError
from brain_lightning.loggers.curves import is_rate
from brain_lightning.loggers.rate_curve import write_rate_curve
from brain_lightning.options.parse_arguments import parse_arguments
from brain_lightning.options.value_keys import Keys, keys_of
from brain_lightning.trials.tune import Found, Tuned, TuneFirstFit

from .run import in_processes
from .script import (
    hyperparameters_file,
    names_output_folder,
    parse_run,
    run_recipe,
    with_output_folder,
)

KINDS = ("lr", "batch")
# What else a recipe calls it.
SIZES = {
    "batch_size": ("batch_size",),
    "max_batch_length": ("max_batch_length", "max_batch_len"),
}


def main(parser: ArgumentParser, words: list[str]) -> int:
    """Searches for a recipe, and prints what to use.

    Args:
        parser: The parser of this command.
        words: What follows the command.

    Returns:
        The exit status.
    """
    parser.usage = (
        "%(prog)s SCRIPT [HPARAMS] [lr|batch] [--override=value] [--output=FILE.png] "
        "[--trainer.X=Y] [--trainer=FILE]"
    )
    parser.description = (
        "Runs a recipe until it trains, and searches there instead, on a copy of its state: "
        "the learning rate to begin with (lr, the default), or the largest batch for which "
        "there is memory (batch). The last line is the override to use. Nothing is trained; "
        "what the recipe writes goes to a temporary output_folder, unless one is given."
    )
    parser.add_argument(
        "--output", metavar="FILE.png", default="lr.png",
        help="the curve of losses at rising learning rates (default: %(default)s)",
    )  # fmt: skip
    options, script, rest, trainer = parse_run(parser, words)
    kind, rest = _kind(rest)
    # What its own would write is of no training.
    trainer["logger"] = DummyLogger()
    picture = _checked(Path(options.output)) if kind == "lr" else None
    with _apart(rest) as apart:
        # Processes that are started here write to the same folder.
        added = apart[len(rest) :]
        return in_processes(
            ["tune", *words, *added], script, apart, trainer,
            lambda: _tune(kind, picture, script, apart, trainer),
        )  # fmt: skip


def _kind(words: Sequence[str]) -> tuple[str, list[str]]:
    """What to search, which follows the hyperparameters file, and the command line without."""
    place = int(words[:1] != [] and words[0].endswith((".yaml", ".yml")))
    kind = words[place] if place < len(words) else ""
    if kind.startswith("-") or not kind:
        return KINDS[0], list(words)
    if kind not in KINDS:
        raise RunOptionError(f"tune searches {' or '.join(KINDS)}, and not {kind!r}")
    return kind, [*words[:place], *words[place + 1 :]]


def _checked(picture: Path) -> Path:
    if picture.suffix.lower() != ".png":
        raise RunOptionError(f"--output={picture}: the curve is drawn as PNG, name a .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError(
            "the curve is drawn by matplotlib, which is not here: pip install matplotlib"
        )
    picture.parent.mkdir(parents=True, exist_ok=True)
    return picture


@contextmanager
def _apart(words: Sequence[str]) -> Iterator[list[str]]:
    """Has a recipe write to a folder that goes, unless its command line names one."""
    if names_output_folder(words):
        yield list(words)
        return
    with TemporaryDirectory(prefix="brain_lightning_tune_") as folder:
        apart = with_output_folder(words, Path(folder, "output"))
        if is_launched() and apart != words:
            raise RecipeError(
                "processes that torchrun or srun has started need one folder: give "
                "--output_folder=..., or let --trainer.devices=2 start them"
            )
        yield apart


def _tune(
    kind: str,
    picture: Path | None,
    script: str,
    words: Sequence[str],
    trainer: Mapping[str, Any],
) -> None:
    tuning = TuneFirstFit(kind)
    try:
        run_recipe(script, words, trainer, [tuning])
    except Tuned:
        assert tuning.found is not None
        if if_main_process():
            _tell(tuning.found, picture, words)
        return
    raise RecipeError(f"{script} has trained nothing, so there is nothing to search with")


def _tell(found: Found, picture: Path | None, words: Sequence[str]) -> None:
    if picture is not None:
        write_rate_curve(picture, found.rates, found.losses, found.value)
    if found.value is None:
        raise RecipeError(
            f"no learning rate is suggested, for the loss falls at none: see {picture}"
        )
    value = f"{found.value:.3g}" if found.name == "lr" else f"{found.value:g}"
    before = ", ".join(f"{each:g}" for each in sorted(found.before))
    print(f"{found.name} {value} is suggested, instead of {before}")  # noqa: T201
    if picture is not None:
        print(f"the losses at rising rates: {picture}")  # noqa: T201
    keys = _keys(found, words)
    if not keys:
        print("no key of the hyperparameters is known to set it: the value is")  # noqa: T201
    print(" ".join(f"--{key}={value}" for key in keys) or value, flush=True)  # noqa: T201


def _keys(found: Found, words: Sequence[str]) -> list[str]:
    """The keys of the hyperparameters file by which a recipe chooses what was found."""
    file = hyperparameters_file(words)
    if file is None:
        return []
    overrides = parse_arguments(words).overrides
    if found.name == "lr":
        return keys_of(file, overrides, found.before, _is_rate, _is_of_optimizer)
    names = SIZES[found.name]
    return keys_of(file, overrides, found.before, names.__contains__, _is_of_training)


def _is_rate(name: str) -> bool:
    return is_rate(name) or "learning_rate" in name


def _is_of_optimizer(keys: Keys, tag: str) -> bool:
    return keys[-1] == "lr" and tag.startswith("!name:")


def _is_of_training(keys: Keys, _: str) -> bool:
    return "train" in ".".join(keys)
