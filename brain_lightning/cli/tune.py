"""``brain-lightning tune``: searches for a learning rate or a batch size for a recipe."""

from __future__ import annotations

import importlib.util
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import DummyLogger

from brain_lightning.distributed.communication import if_main_process
from brain_lightning.errors import RecipeError, RunOptionError, UnsupportedError
from brain_lightning.loggers.curves import is_rate
from brain_lightning.loggers.rate_curve import write_rate_curve
from brain_lightning.options.parse_arguments import parse_arguments
from brain_lightning.options.value_keys import Keys, keys_of
from brain_lightning.trials.tune import Found, Tuned, TuneFirstFit

from .processes import run_in_processes
from .script import hyperparameters_file, parse_run, run_recipe, temporary_output

KINDS = ("lr", "batch")
# Names of hyperparameters by which recipes set each size.
SIZES = {
    "batch_size": ("batch_size",),
    "max_batch_length": ("max_batch_length", "max_batch_len"),
}


def main(parser: ArgumentParser, words: list[str]) -> int:
    """Searches for a value, and prints the override that sets it.

    Args:
        parser: Parser of this command.
        words: Command line after the command.

    Returns:
        The exit status.
    """
    parser.usage = (
        "%(prog)s SCRIPT [HPARAMS] [lr|batch] [--override=value] [--output=FILE.png] "
        "[--trainer.X=Y] [--trainer=FILE]"
    )
    parser.description = (
        "Runs a recipe until it trains, and then searches on a snapshot of the Brain: for an "
        "initial learning rate (lr, the default), or for the largest batch that fits into "
        "memory (batch). The last line of the output is the override to use. Nothing is "
        "trained. The recipe writes to a temporary output_folder, unless --output_folder is "
        "given."
    )
    parser.add_argument(
        "--output", metavar="FILE.png", default="lr.png",
        help="plot of the loss against the learning rate (default: %(default)s)",
    )  # fmt: skip
    options, script, rest, trainer = parse_run(parser, words)
    kind, rest = _split_kind(rest)
    # The recipe's logger would log a run in which nothing is trained.
    trainer["logger"] = DummyLogger()
    plot = _checked_plot(Path(options.output)) if kind == "lr" else None
    with temporary_output(parser.prog, rest) as redirected:
        # The processes that this one starts write to the same folder.
        added = redirected[len(rest) :]
        return run_in_processes(
            ["tune", *words, *added], script, redirected, trainer,
            lambda: _tune(kind, plot, script, redirected, trainer),
        )  # fmt: skip


def _split_kind(words: Sequence[str]) -> tuple[str, list[str]]:
    """Takes ``lr`` or ``batch``, which follows the YAML file, out of the command line."""
    position = int(words[:1] != [] and words[0].endswith((".yaml", ".yml")))
    kind = words[position] if position < len(words) else ""
    if kind.startswith("-") or not kind:
        return KINDS[0], list(words)
    if kind not in KINDS:
        raise RunOptionError(f"tune cannot search for {kind!r}. Use {' or '.join(KINDS)}.")
    return kind, [*words[:position], *words[position + 1 :]]


def _checked_plot(plot: Path) -> Path:
    if plot.suffix.lower() != ".png":
        raise RunOptionError(f"--output={plot} is not a PNG file. Give a name ending in .png.")
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError(
            "tune lr needs matplotlib for its plot. Run pip install matplotlib."
        )
    plot.parent.mkdir(parents=True, exist_ok=True)
    return plot


def _tune(
    kind: str,
    plot: Path | None,
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
            _print_result(tuning.found, plot, words)
        return
    raise RecipeError(f"nothing was searched: {script} called no fit")


def _print_result(found: Found, plot: Path | None, words: Sequence[str]) -> None:
    if plot is not None:
        write_rate_curve(plot, found.rates, found.losses, found.value)
    if found.value is None:
        raise RecipeError(
            f"no learning rate is suggested, because the loss decreased at none. See {plot}."
        )
    value = f"{found.value:.3g}" if found.name == "lr" else f"{found.value:g}"
    before = ", ".join(f"{each:g}" for each in sorted(found.before))
    print(f"suggested {found.name}: {value} (current: {before})")  # noqa: T201
    if plot is not None:
        print(f"plot of the loss against the learning rate: {plot}")  # noqa: T201
    keys = _keys(found, words)
    if not keys:
        print("no key of the hyperparameters file sets it. The value:")  # noqa: T201
    print(" ".join(f"--{key}={value}" for key in keys) or value, flush=True)  # noqa: T201


def _keys(found: Found, words: Sequence[str]) -> list[str]:
    """Returns the keys of the hyperparameters file that set the value in the recipe."""
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
