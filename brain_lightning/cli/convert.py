"""``brain-lightning convert``: a CKPT+ directory, a Lightning file, a folder for inference."""

from __future__ import annotations

import glob
import logging
import shutil
from argparse import ArgumentParser
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
from torch import Tensor

from brain_lightning.checkpoints import atomic_directory as store
from brain_lightning.checkpoints import integrity
from brain_lightning.checkpoints.checkpoint import Checkpoint, Ranking, checkpoint_in, saved_in
from brain_lightning.checkpoints.content import read_files, write_files
from brain_lightning.checkpoints.meta_file import METAFNAME, dump_meta
from brain_lightning.checkpoints.state_files import (
    PARAMFILE_EXT,
    is_in_shards,
    load_state,
    write_state,
)
from brain_lightning.errors import CheckpointError, RecipeError
from brain_lightning.loggers.console import show_information
from brain_lightning.module.checkpoint_file import MODULES
from brain_lightning.resume.run_state import KEY

from .convert_hparams import Hyperparameters

logger = logging.getLogger(__name__)


def main(parser: ArgumentParser, words: list[str]) -> int:
    """Converts a checkpoint, and prints the path of what was written.

    Args:
        parser: The parser of this command.
        words: What follows the command.

    Returns:
        The exit status.
    """
    parser.usage = "%(prog)s SRC DST [--hparams=FILE] [--min_key=NAME | --max_key=NAME]"
    parser.description = (
        "Turns a CKPT+ directory into a Lightning file (DST is x.ckpt) or a folder for "
        "SpeechBrain's from_hparams (any other name), and a Lightning file, or a CKPT+ "
        "directory in shards, into a whole CKPT+ directory (DST is CKPT+x)."
    )
    parser.add_argument("source", metavar="SRC", help="a checkpoint, or a folder of them")
    parser.add_argument("target", metavar="DST", help="what to write; it must not be there")
    parser.add_argument("--hparams", metavar="FILE", help="the recipe's hyperparameters")
    best = parser.add_mutually_exclusive_group()
    best.add_argument(
        "--min_key", metavar="NAME",
        help="of a folder of checkpoints the one with the lowest NAME in its meta, such as "
        "error (default: the newest)",
    )  # fmt: skip
    best.add_argument("--max_key", metavar="NAME", help="the one with the highest")
    # Which checkpoint it was, and what is left out; the standard output has the path alone.
    show_information()
    options = parser.parse_args(words)
    keys = (options.min_key, options.max_key)
    print(convert(options.source, options.target, options.hparams, *keys))  # noqa: T201
    return 0


def convert(
    source: str,
    target: str,
    hparams: str | None = None,
    min_key: str | None = None,
    max_key: str | None = None,
) -> Path:
    """Converts a checkpoint to the form that the target's name asks for, and logs which one.

    Args:
        source: A ``CKPT+`` directory, a directory of such (the newest one is taken, unless
            there is a key), or a Lightning ``.ckpt`` file.
        target: ``x.ckpt`` for a Lightning file, ``CKPT+x`` for a checkpoint directory that
            is not in shards; any other name is a folder for inference.
        hparams: The recipe's hyperparameters, for inference; by default the
            ``hyperparams.yaml`` that SpeechBrain wrote beside its ``save`` folder.
        min_key: A name in ``meta``, as of ``find_checkpoint``: the lowest value is taken.
        max_key: The same, for the highest value.

    Returns:
        What was written.

    Raises:
        RecipeError: The target is there already, or a file is not, or a key chooses nothing.
        CheckpointError: The source is no checkpoint, or is damaged.
        ValueError: Both keys were given.
    """
    path = Path(target)
    if path.exists():
        raise RecipeError(f"{target} is there already: give another name, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    if Path(source).is_file():
        _refuse_key(source, max_key if min_key is None else min_key)
        return from_lightning(Path(source), path)
    checkpoint = _checkpoint(Path(source).resolve(), min_key, max_key)
    integrity.check(checkpoint.path)
    if path.suffix == PARAMFILE_EXT:
        return to_lightning_file(checkpoint, path)
    if path.name.startswith(store.CKPT_PREFIX):
        return to_full_directory(checkpoint, path)
    return to_inference(checkpoint, path, hparams)


def _refuse_key(source: str | Path, key: str | None) -> None:
    if key is not None:
        raise RecipeError(
            f"{source} is one checkpoint, and {key!r} chooses among several: leave the "
            "key out, or give the folder that they are in"
        )


def _checkpoint(source: Path, min_key: str | None, max_key: str | None) -> Checkpoint:
    """The checkpoint that a directory is, else the best one of those in it."""
    alone = checkpoint_in(source)
    if alone is not None:
        _refuse_key(source, max_key if min_key is None else min_key)
        logger.info("%s: %s", alone.path, _in_a_line(alone.meta))
        return alone
    ranking = Ranking.by_one(None, max_key, min_key)
    inside = saved_in(source)
    if not inside:
        raise CheckpointError(f"{source} is no checkpoint, and holds none")
    why = "the newest" if max_key is None else f"the highest {max_key!r}"
    if min_key is not None:
        why = f"the lowest {min_key!r}"
    best = next(iter(ranking.ranked(inside, None)), None)
    if best is None:
        names = ", ".join(sorted({name for c in inside for name in c.meta}))
        raise RecipeError(
            f"no checkpoint in {source} has {why}: what they say is {names}; choose one of "
            "these, or leave the key out for the newest"
        )
    logger.info("%s, %s of %d: %s", best.path, why, len(inside), _in_a_line(best.meta))
    return best


def _in_a_line(meta: Mapping[str, Any]) -> str:
    # When it was saved is in its name, and of no use as a number of seconds.
    shown = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in meta.items()
        if name != "unixtime"
    ]
    return " ".join(", ".join(shown).split())


def to_lightning_file(checkpoint: Checkpoint, path: Path) -> Path:
    """Writes a Lightning file that holds all that a checkpoint directory holds.

    Args:
        checkpoint: The checkpoint.
        path: The file.

    Returns:
        ``path``.
    """
    own = read_files(checkpoint.path)
    states = own.pop("states")
    modules = {name: state for name, state in states.items() if _is_module(state)}
    optimizers = {name: state for name, state in states.items() if _is_optimizer(state)}
    done = modules.keys() | optimizers.keys()
    epoch = checkpoint.meta.get("epoch")
    content = {
        "pytorch-lightning_version": lightning.__version__,
        "epoch": epoch if isinstance(epoch, int) else 0,
        "global_step": 0,
        "state_dict": {
            f"{MODULES}.{name}.{key}": tensor
            for name, state in modules.items()
            for key, tensor in state.items()
        },
        "optimizer_states": [optimizers],
        "lr_schedulers": [],
        "callbacks": {},
        KEY: {
            **own,
            "modules": {name: _described(name, state) for name, state in modules.items()},
            "states": {name: state for name, state in states.items() if name not in done},
        },
    }
    temporary = path.with_name(f"{path.name}.part")
    write_state(content, temporary)
    return temporary.replace(path)


def to_full_directory(checkpoint: Checkpoint, directory: Path) -> Path:
    """Writes the directory that ``sharded_checkpoints=False`` would have saved.

    Args:
        checkpoint: One of which some files are folders of shards.
        directory: The checkpoint directory.

    Returns:
        ``directory``.

    Raises:
        RecipeError: It is what is asked for already.
    """
    in_shards = {n: path for n, path in checkpoint.paramfiles.items() if is_in_shards(path)}
    if not in_shards:
        raise RecipeError(f"{checkpoint.path} is a checkpoint directory already: copy it")
    temporary = store.new_directory(directory.parent)
    with store.removed_on_failure(temporary):
        left_out = (integrity.CHECKSUMS, *(path.name for path in in_shards.values()))
        ignore = shutil.ignore_patterns(*map(glob.escape, left_out))
        shutil.copytree(checkpoint.path, temporary, ignore=ignore, dirs_exist_ok=True)
        for path in in_shards.values():
            write_state(load_state(path), temporary / path.name)
        return store.publish(temporary, directory)


def _described(name: str, state: Any) -> dict[str, Any]:
    """A name may have dots; the version of each submodule is an attribute of the state."""
    keys = {key: f"{MODULES}.{name}.{key}" for key in state}
    return {"keys": keys, "metadata": dict(getattr(state, "_metadata", {}))}


def _is_module(state: Any) -> bool:
    return isinstance(state, Mapping) and all(isinstance(v, Tensor) for v in state.values())


def _is_optimizer(state: Any) -> bool:
    return isinstance(state, Mapping) and {"state", "param_groups"} <= state.keys()


def from_lightning(source: Path, directory: Path) -> Path:
    """Writes a checkpoint directory of what a Lightning file holds.

    Args:
        source: The file: one that ``to_lightning_file`` wrote, or that Lightning wrote of
            a Brain's module; then each entry of the Brain's modules is a recoverable.
        directory: The checkpoint directory.

    Returns:
        ``directory``.

    Raises:
        RecipeError: ``directory`` has another name than a checkpoint's.
    """
    if not directory.name.startswith(store.CKPT_PREFIX):
        raise RecipeError(
            f"{source} becomes a checkpoint directory: give a target such as "
            f"{directory.parent / 'CKPT+converted'}"
        )
    saved = load_state(source)
    own = saved.get(KEY, {})
    states = _modules(saved["state_dict"], own.get("modules", {}))
    # The default init_optimizers registers its optimizer by another name.
    names = {"opt_class": "optimizer"}
    names |= {member: name for name, member in own.get("optimizers", {}).items()}
    for optimizers in saved.get("optimizer_states", []):
        states |= {names.get(name, name): state for name, state in optimizers.items()}
    temporary = store.new_directory(directory.parent)
    with store.removed_on_failure(temporary):
        if "meta" not in own:
            meta = {"unixtime": source.stat().st_mtime, "end-of-epoch": True}
            dump_meta({**meta, "epoch": saved["epoch"]}, temporary / METAFNAME)
        for name, state in states.items():
            write_state(state, temporary / f"{name}{PARAMFILE_EXT}")
        write_files(own, temporary)
        written = checkpoint_in(store.publish(temporary, directory))
    assert written is not None
    logger.info("%s: %s", source, _in_a_line(written.meta))
    return written.path


def _modules(state: Mapping[str, Tensor], described: Mapping[str, Any]) -> dict[str, Any]:
    """Recoverable modules; weights that are in none of them belong to their entry."""
    # ModelPruning has saved weights under other names than the module had, masked.
    there = {n: each for n, each in described.items() if {*each["keys"].values()} <= {*state}}
    known = {weight for each in there.values() for weight in each["keys"].values()}
    entries: dict[str, Any] = {}
    for weight in state:
        if weight not in known:
            name, _, key = weight.removeprefix(f"{MODULES}.").partition(".")
            entries.setdefault(name, {"keys": {}, "metadata": {}})["keys"][key] = weight
    if missing := sorted(known - state.keys()):
        raise CheckpointError(
            f"the file lacks weights of the modules, such as {missing[0]!r}, and a checkpoint "
            "directory has all: resume it by fit(ckpt_path=...) with strict_loading = False"
        )
    modules: dict[str, Any] = {}
    for name, each in {**entries, **there}.items():
        modules[name] = OrderedDict((key, state[w]) for key, w in each["keys"].items())
        modules[name]._metadata = OrderedDict(each["metadata"])
    return modules


def to_inference(checkpoint: Checkpoint, folder: Path, hparams: str | None) -> Path:
    """Writes what SpeechBrain's ``from_hparams`` reads.

    Args:
        checkpoint: The checkpoint.
        folder: The folder.
        hparams: See ``convert``.

    Returns:
        ``folder``.

    Raises:
        RecipeError: There are no hyperparameters, or inference could not load them.
    """
    yaml = Path(hparams or checkpoint.path.parent.parent / "hyperparams.yaml")
    if not yaml.is_file():
        raise RecipeError(f"{yaml} is not there: give the recipe's file with --hparams=FILE")
    recipe = Hyperparameters(yaml)
    states = read_files(checkpoint.path)["states"]
    names = sorted(checkpoint.paramfiles)
    # Weights that no name leads to are asked for, not left out.
    weights = {name for name, state in states.items() if _is_module(state) and state}
    carried = [name for name in names if name in weights or recipe.is_module(name)]
    temporary = store.new_directory(folder.parent)
    with store.removed_on_failure(temporary):
        for name in carried:
            path = checkpoint.paramfiles[name]
            if is_in_shards(path):
                write_state(states[name], temporary / path.name)
            else:
                shutil.copy(path, temporary)
        recipe.write(carried, temporary / "hyperparams.yaml")
        store.rename(temporary, folder)
    _log_left_out(names, carried, recipe.pretrained())
    return folder


def _log_left_out(names: list[str], carried: list[str], pretrained: set[str]) -> None:
    left = [name for name in names if name not in carried]
    logger.info("For inference: %s; left out: %s", _listed(carried), _listed(left))
    if others := sorted(pretrained.difference(carried)):
        logger.warning(
            "The recipe's own pretrainer loads %s, of which the checkpoint has nothing: add "
            "the files, and loadables for them, yourself",
            _listed(others),
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "nothing"
