"""``brain-lightning convert``: converts checkpoints of SpeechBrain and Lightning."""

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
    """Converts a checkpoint, and prints the path of the result.

    Args:
        parser: Parser of this command.
        words: Command line after the command.

    Returns:
        The exit status.
    """
    parser.usage = "%(prog)s SRC DST [--hparams=FILE] [--min_key=NAME | --max_key=NAME]"
    parser.description = (
        "Converts a checkpoint. The name of DST selects the format: x.ckpt is a Lightning "
        "file, CKPT+x is a SpeechBrain checkpoint directory, and any other name is a folder "
        "for SpeechBrain's from_hparams. SRC is a CKPT+ directory, sharded or not, or, for "
        "DST=CKPT+x, a Lightning file."
    )
    parser.add_argument("source", metavar="SRC", help="a checkpoint, or a folder of them")
    parser.add_argument("target", metavar="DST", help="path to write; it must not exist")
    parser.add_argument(
        "--hparams", metavar="FILE",
        help="the recipe's hyperparameters, for inference (default: hyperparams.yaml beside "
        "the save folder)",
    )  # fmt: skip
    best = parser.add_mutually_exclusive_group()
    best.add_argument(
        "--min_key", metavar="NAME",
        help="if SRC is a folder of checkpoints, take the one with the lowest NAME in its "
        "meta, for example error (default: the newest)",
    )  # fmt: skip
    best.add_argument(
        "--max_key", metavar="NAME", help="the same, with the highest NAME"
    )  # fmt: skip
    # Logs the chosen checkpoint and what is left out. Standard output has only the path.
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
    """Converts a checkpoint to the format that the target's name selects.

    Logs which checkpoint is converted.

    Args:
        source: A ``CKPT+`` directory, a folder of such directories (the newest one is taken,
            unless a key is given), or a Lightning ``.ckpt`` file.
        target: ``x.ckpt`` for a Lightning file, ``CKPT+x`` for a checkpoint directory that
            is not sharded, any other name for an inference folder.
        hparams: The recipe's hyperparameters file, for inference. Default: the
            ``hyperparams.yaml`` that SpeechBrain wrote beside its ``save`` folder.
        min_key: A name in ``meta``, as in ``find_checkpoint``. The checkpoint with the lowest
            value is taken.
        max_key: The same, for the highest value.

    Returns:
        Path of the result.

    Raises:
        RecipeError: The target exists, a file does not exist, or a key selects nothing.
        CheckpointError: The source is not a checkpoint, or is damaged.
        ValueError: Both keys were given.
    """
    path = Path(target)
    if path.exists():
        raise RecipeError(f"{target} exists already. Give another name, or remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if Path(source).is_file():
        _check_no_key(source, max_key if min_key is None else min_key)
        return from_lightning(Path(source), path)
    checkpoint = _checkpoint(Path(source).resolve(), min_key, max_key)
    integrity.check(checkpoint.path)
    if path.suffix == PARAMFILE_EXT:
        return to_lightning_file(checkpoint, path)
    if path.name.startswith(store.CKPT_PREFIX):
        return to_full_directory(checkpoint, path)
    return to_inference(checkpoint, path, hparams)


def _check_no_key(source: str | Path, key: str | None) -> None:
    if key is not None:
        raise RecipeError(
            f"{source} is a single checkpoint, and key {key!r} selects one of several. Leave "
            "out the key, or give a folder of checkpoints."
        )


def _checkpoint(source: Path, min_key: str | None, max_key: str | None) -> Checkpoint:
    """Returns the checkpoint at a path, or the best checkpoint of a folder."""
    single = checkpoint_in(source)
    if single is not None:
        _check_no_key(source, max_key if min_key is None else min_key)
        logger.info("%s: %s", single.path, _one_line(single.meta))
        return single
    ranking = Ranking.by_one(None, max_key, min_key)
    inside = saved_in(source)
    if not inside:
        raise CheckpointError(f"{source} is not a checkpoint, and contains none")
    why = "the newest" if max_key is None else f"the highest {max_key!r}"
    if min_key is not None:
        why = f"the lowest {min_key!r}"
    best = next(iter(ranking.ranked(inside, None)), None)
    if best is None:
        key = max_key if min_key is None else min_key
        names = ", ".join(sorted({name for c in inside for name in c.meta}))
        raise RecipeError(
            f"no checkpoint in {source} has the key {key!r}. Available keys: {names}. Use one "
            "of them, or leave out the key to take the newest checkpoint."
        )
    logger.info("%s, %s of %d: %s", best.path, why, len(inside), _one_line(best.meta))
    return best


def _one_line(meta: Mapping[str, Any]) -> str:
    # The time of the save is left out: the checkpoint's name has it in a readable form.
    shown = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in meta.items()
        if name != "unixtime"
    ]
    return " ".join(", ".join(shown).split())


def to_lightning_file(checkpoint: Checkpoint, path: Path) -> Path:
    """Writes a Lightning file with the full content of a checkpoint directory.

    Args:
        checkpoint: The checkpoint.
        path: Path of the file to write.

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
            "modules": {name: _weight_keys(name, state) for name, state in modules.items()},
            "states": {name: state for name, state in states.items() if name not in done},
        },
    }
    temporary = path.with_name(f"{path.name}.part")
    write_state(content, temporary)
    return temporary.replace(path)


def to_full_directory(checkpoint: Checkpoint, directory: Path) -> Path:
    """Writes the directory that ``sharded_checkpoints=False`` would have saved.

    Args:
        checkpoint: A sharded checkpoint, in which some files are folders of shards.
        directory: Checkpoint directory to write.

    Returns:
        ``directory``.

    Raises:
        RecipeError: The checkpoint is not sharded.
    """
    in_shards = {n: path for n, path in checkpoint.paramfiles.items() if is_in_shards(path)}
    if not in_shards:
        raise RecipeError(
            f"{checkpoint.path} is not sharded. To get the same checkpoint directory, copy it."
        )
    temporary = store.new_directory(directory.parent)
    with store.removed_on_failure(temporary):
        left_out = (integrity.CHECKSUMS, *(path.name for path in in_shards.values()))
        ignore = shutil.ignore_patterns(*map(glob.escape, left_out))
        shutil.copytree(checkpoint.path, temporary, ignore=ignore, dirs_exist_ok=True)
        for path in in_shards.values():
            write_state(load_state(path), temporary / path.name)
        return store.publish(temporary, directory)


def _weight_keys(name: str, state: Any) -> dict[str, Any]:
    """Returns the key of each weight, and the versions of the submodules.

    The keys are stored because a name may contain dots.
    """
    keys = {key: f"{MODULES}.{name}.{key}" for key in state}
    return {"keys": keys, "metadata": dict(getattr(state, "_metadata", {}))}


def _is_module(state: Any) -> bool:
    return isinstance(state, Mapping) and all(isinstance(v, Tensor) for v in state.values())


def _is_optimizer(state: Any) -> bool:
    return isinstance(state, Mapping) and {"state", "param_groups"} <= state.keys()


def from_lightning(source: Path, directory: Path) -> Path:
    """Writes a checkpoint directory with the content of a Lightning file.

    Args:
        source: A file that ``to_lightning_file`` wrote, or that Lightning wrote for a Brain.
            From Lightning's file each entry of the Brain's modules becomes a recoverable.
        directory: Checkpoint directory to write.

    Returns:
        ``directory``.

    Raises:
        RecipeError: The name of ``directory`` does not begin with ``CKPT+``.
    """
    if not directory.name.startswith(store.CKPT_PREFIX):
        raise RecipeError(
            f"{source} can only be converted to a checkpoint directory. Give a name that "
            f"begins with CKPT+, for example {directory.parent / 'CKPT+converted'}."
        )
    saved = load_state(source)
    own = saved.get(KEY, {})
    states = _modules(saved["state_dict"], own.get("modules", {}))
    # The default init_optimizers registers its optimizer under another name.
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
    logger.info("%s: %s", source, _one_line(written.meta))
    return written.path


def _modules(state: Mapping[str, Tensor], described: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the state of each recoverable module.

    Weights that belong to none of the recoverables belong to their entry of ``modules``.
    """
    # ModelPruning saves masked weights under other names than those of the module.
    there = {n: each for n, each in described.items() if {*each["keys"].values()} <= {*state}}
    known = {weight for each in there.values() for weight in each["keys"].values()}
    entries: dict[str, Any] = {}
    for weight in state:
        if weight not in known:
            name, _, key = weight.removeprefix(f"{MODULES}.").partition(".")
            entries.setdefault(name, {"keys": {}, "metadata": {}})["keys"][key] = weight
    if missing := sorted(known - state.keys()):
        raise CheckpointError(
            f"the file lacks weights of the modules, for example {missing[0]!r}, and a "
            "checkpoint directory needs all of them. Resume the file with "
            "fit(ckpt_path=...) and strict_loading = False."
        )
    modules: dict[str, Any] = {}
    for name, each in {**entries, **there}.items():
        modules[name] = OrderedDict((key, state[w]) for key, w in each["keys"].items())
        modules[name]._metadata = OrderedDict(each["metadata"])
    return modules


def to_inference(checkpoint: Checkpoint, folder: Path, hparams: str | None) -> Path:
    """Writes a folder for SpeechBrain's ``from_hparams``.

    Args:
        checkpoint: The checkpoint.
        folder: Folder to write.
        hparams: See ``convert``.

    Returns:
        ``folder``.

    Raises:
        RecipeError: The hyperparameters file does not exist, or inference could not load it.
    """
    yaml = Path(hparams or checkpoint.path.parent.parent / "hyperparams.yaml")
    if not yaml.is_file():
        raise RecipeError(
            f"hyperparameters file {yaml} was not found. Set --hparams=FILE to the recipe's "
            "file."
        )
    recipe = Hyperparameters(yaml)
    states = read_files(checkpoint.path)["states"]
    names = sorted(checkpoint.paramfiles)
    # Weights without an entry in the file are included too: `write` raises an error for them.
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
    logger.info("For inference: %s. Left out: %s.", _listed(carried), _listed(left))
    if others := sorted(pretrained.difference(carried)):
        logger.warning(
            "The recipe's pretrainer also loads %s, which is not in the checkpoint. Add its "
            "files to the folder, and its loadables to hyperparams.yaml.",
            _listed(others),
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "nothing"
