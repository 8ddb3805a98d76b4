"""``brain-lightning port``: ports a recipe to brain_lightning."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from brain_lightning.errors import RecipeError
from brain_lightning.options.parse_arguments import split_trainer
from brain_lightning.port.local_modules import IGNORES_COMMAND_LINE, ignores_command_line

from .script import check_script, parse_command
from .verify import verify

if TYPE_CHECKING:
    # LibCST is an optional extra.
    from brain_lightning.port.recipe import PortedRecipe


def main(parser: ArgumentParser, words: list[str]) -> int:
    """Ports a recipe, and reports the lines that are left unchanged and need attention.

    Args:
        parser: Parser of this command.
        words: Command line after the command.

    Returns:
        The exit status: 0 if the whole recipe is ported.

    Raises:
        RecipeError: LibCST is not installed, or a file cannot be read, ported or written.
    """
    parser.usage = (
        "%(prog)s SCRIPT [HPARAMS ...] [--write | --out DIR] [--verify [--override=value]]"
    )
    parser.description = (
        "Ports a recipe to brain_lightning, and prints the changes as a diff for `git apply` "
        "or `patch -p1`. Lines that cannot be ported are listed on stderr. The exit status is "
        "0 only if the whole recipe is ported."
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--write", action="store_true", help="change the files in place")
    target.add_argument(
        "--out", metavar="DIR",
        help="write the ported files to another folder, together with the modules in the "
        "script's folder that it imports",
    )  # fmt: skip
    parser.add_argument(
        "--verify", action="store_true",
        help="run the recipe on SpeechBrain's loop and its port on a Trainer, with the "
        "overrides of the command line, and compare them as `verify` does",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, default=10, metavar="N",
        help="number of training batches for --verify, 0 for all (default: %(default)s)",
    )  # fmt: skip
    options, script, rest = parse_command(parser, words)
    files = [word for word in rest if word.endswith((".yaml", ".yml")) and word[0] != "-"]
    overrides = [word for word in rest if word not in files]
    if overrides and not options.verify:
        parser.error(f"{' '.join(overrides)}: overrides need --verify")
    recipe = _ported(script, files)
    ignores = bool(recipe.brains) and ignores_command_line(recipe.script)
    # Verified before --write changes the recipe, which is one side of the comparison.
    is_equal = not options.verify or _verify_port(recipe, options, overrides)
    _write(recipe, options)
    if ignores:
        # No code has to change for this remark, so the port may still be complete.
        print(f"{script}: {IGNORES_COMMAND_LINE}", file=sys.stderr)  # noqa: T201
    print(_summary(recipe), file=sys.stderr)  # noqa: T201
    return 0 if is_equal and recipe.outcome == "completely" else 1


def _ported(script: str, files: Sequence[str]) -> PortedRecipe:
    if importlib.util.find_spec("libcst") is None:
        raise RecipeError("port needs LibCST. Run pip install 'brain_lightning[port]'.")
    from brain_lightning.port.recipe import port_recipe

    check_script(script)
    return port_recipe(Path(script), [Path(file) for file in files])


def _write(recipe: PortedRecipe, options: Namespace) -> None:
    from brain_lightning.port.files import unified_diff, write_beside, write_in_place

    if options.out is not None:
        places = write_beside(recipe.changes, Path(options.out))
        print(*places.values(), sep="\n")  # noqa: T201
    elif options.write:
        for path in write_in_place(recipe.changes):
            print(path)  # noqa: T201
    else:
        sys.stdout.write(unified_diff(recipe.changes))


def _verify_port(recipe: PortedRecipe, options: Namespace, overrides: Sequence[str]) -> bool:
    """Compares the recipe with its port, in a folder with links to its other files."""
    from brain_lightning.port.files import link_rest, write_beside

    trainer, words = split_trainer(overrides)
    with tempfile.TemporaryDirectory(prefix="brain_lightning_port_") as folder:
        places = write_beside(recipe.changes, Path(folder))
        link_rest(places)
        comparison = verify(
            str(recipe.script),
            [*map(str, recipe.hparams[:1]), *words],
            options.steps,
            trainer,
            ported=(
                str(places[recipe.script]),
                [*(str(places[path]) for path in recipe.hparams[:1]), *words],
            ),
        )
    comparison = comparison.without_hooks(recipe.port_only_hooks)
    print(comparison.as_text(), file=sys.stderr)  # noqa: T201
    return comparison.verified


def _summary(recipe: PortedRecipe) -> str:
    from brain_lightning.port.files import changed_lines

    counts = [count for change in recipe.changes if (count := changed_lines(change))]
    summary = f"ported {recipe.outcome}: {sum(counts)} lines changed (files: {len(counts)})"
    if recipe.remarks:
        summary += f"; remarks above: {len(recipe.remarks)}"
    return "\n".join([*map(str, recipe.remarks), f"{recipe.script}: {summary}"])
