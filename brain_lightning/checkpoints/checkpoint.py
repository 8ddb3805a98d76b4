"""One checkpoint among others: how it is found, ranked and averaged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from brain_lightning.errors import CheckpointError

from .atomic_directory import may_be_checkpoint
from .integrity import check_meta
from .meta_file import METAFNAME, load_meta
from .state_files import PARAMFILE_EXT, load_state

logger = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A saved checkpoint.

    Attributes:
        path: Its directory.
        meta: The values in its meta file, with ``unixtime`` and ``end-of-epoch``.
        paramfiles: The file of each recoverable, by name.
    """

    path: Path
    meta: dict[str, Any]
    paramfiles: dict[str, Path]

    def __hash__(self) -> int:
        return hash(self.path)


Key = Callable[[Checkpoint], Any]
Predicate = Callable[[Checkpoint], bool]


def ckpt_recency(ckpt: Checkpoint) -> Any:
    """When a checkpoint was saved, as a measure of its importance."""
    return ckpt.meta["unixtime"]


class Ranking(NamedTuple):
    """How checkpoints are ranked, and which have a rank at all; None for all of them."""

    key: Key
    has_rank: Predicate | None = None

    @classmethod
    def by_meta(cls, name: str, sign: int) -> Ranking:
        """By a value in ``meta``.

        Args:
            name: The value's name; checkpoints without it have no rank.
            sign: 1 where more is better, -1 where less is.
        """

        def key(checkpoint: Checkpoint) -> Any:
            value = checkpoint.meta[name]
            return -value if sign < 0 else value

        return cls(key, lambda checkpoint: name in checkpoint.meta)

    @classmethod
    def by_one(
        cls, importance_key: Key | None, max_key: str | None, min_key: str | None
    ) -> Ranking:
        """By the one key that was given, else by recency.

        Args:
            importance_key: The highest value counts.
            max_key: A name in ``meta``; the highest value counts.
            min_key: A name in ``meta``; the lowest value counts.

        Raises:
            ValueError: More than one was given.
        """
        if sum(key is not None for key in (importance_key, max_key, min_key)) > 1:
            raise ValueError(
                f"importance_key={importance_key}, max_key={max_key!r} and "
                f"min_key={min_key!r} exclude each other: give one of them"
            )
        if max_key is not None:
            return cls.by_meta(max_key, 1)
        if min_key is not None:
            return cls.by_meta(min_key, -1)
        return cls(importance_key or ckpt_recency)

    @classmethod
    def by_each(
        cls, importance_keys: Sequence[Key], max_keys: Sequence[str], min_keys: Sequence[str]
    ) -> list[Ranking]:
        """One by every key that was given.

        Args:
            importance_keys: The highest value counts.
            max_keys: Names in ``meta``; the highest value counts.
            min_keys: Names in ``meta``; the lowest value counts.
        """
        lowest = [cls.by_meta(name, -1) for name in min_keys]
        highest = [cls.by_meta(name, 1) for name in max_keys]
        return [*lowest, *highest, *map(cls, importance_keys)]

    def ranked(
        self, checkpoints: Iterable[Checkpoint], predicate: Predicate | None
    ) -> list[Checkpoint]:
        """Ranks checkpoints.

        Args:
            checkpoints: In any order.
            predicate: Only those for which it is true are considered.

        Returns:
            Those that have a rank, the most important first.
        """
        chosen = filter(predicate, filter(self.has_rank, checkpoints))
        # By recency first: of two that are as important the newer one stays in front.
        newest_first = sorted(chosen, key=ckpt_recency, reverse=True)
        return sorted(newest_first, key=self.key, reverse=True)


def saved_in(folder: Path) -> list[Checkpoint]:
    """Every checkpoint in a folder, in no order; one that cannot be read is left out.

    Args:
        folder: The folder; there are none in one that does not exist.
    """
    paths = filter(may_be_checkpoint, folder.iterdir()) if folder.is_dir() else []
    return [found for found in map(checkpoint_in, paths) if found is not None]


def checkpoint_in(path: Path) -> Checkpoint | None:
    """Reads the meta file of a checkpoint.

    Args:
        path: Anything in a directory of checkpoints.

    Returns:
        The checkpoint; None for what is none, or cannot be read, which is logged.
    """
    if not (path / METAFNAME).exists():
        return None
    try:
        check_meta(path)
        meta = load_meta(path / METAFNAME)
        files = {f.stem: f for f in path.iterdir() if f.suffix == PARAMFILE_EXT}
        return Checkpoint(path, meta, files)
    except FileNotFoundError:
        # Deleted or replaced meanwhile.
        return None
    except (CheckpointError, OSError) as error:
        logger.warning("%s is skipped: %s", path, error)
        return None


def average_state_dicts(state_dicts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several states; two of them are in memory at a time.

    Args:
        state_dicts: The states.

    Returns:
        Their mean.

    Raises:
        ValueError: There are none.
    """
    states = iter(state_dicts)
    total = next(states, None)
    if total is None:
        raise ValueError("No state dicts to average.")
    count = 1
    for state in states:
        count += 1
        for name, value in state.items():
            total[name] = total[name] + value
    return {name: value / float(count) for name, value in total.items()}


def average_checkpoints(
    checkpoint_list: Iterable[Checkpoint],
    recoverable_name: str,
    parameter_loader: Callable[[Path], Any] = load_state,
    averager: Callable[[Iterable[Any]], Any] = average_state_dicts,
    device: Any = None,
) -> Any:
    """The mean of a recoverable over several checkpoints.

    Args:
        checkpoint_list: The checkpoints.
        recoverable_name: The recoverable.
        parameter_loader: Reads a file.
        averager: Makes the mean of what was read.
        device: Where the mean is to be, as in SpeechBrain 0.5; by default where the files
            were read to.

    Returns:
        What ``averager`` returns: a state to load.
    """
    files = (checkpoint.paramfiles[recoverable_name] for checkpoint in checkpoint_list)
    return averager(_moved(parameter_loader(path), device) for path in files)


def _moved(state: Any, device: Any) -> Any:
    if device is None or not isinstance(state, dict):
        return state
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in state.items()}
