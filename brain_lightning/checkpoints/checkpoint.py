"""Checkpoints as values: lists, ranks and averages them."""

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
        path: Directory of the checkpoint.
        meta: Values of its meta file, with ``unixtime`` and ``end-of-epoch``.
        paramfiles: File of each recoverable, by name.
    """

    path: Path
    meta: dict[str, Any]
    paramfiles: dict[str, Path]

    def __hash__(self) -> int:
        return hash(self.path)


Key = Callable[[Checkpoint], Any]
Predicate = Callable[[Checkpoint], bool]


def ckpt_recency(ckpt: Checkpoint) -> Any:
    """Returns the time of a save, as the importance of a checkpoint."""
    return ckpt.meta["unixtime"]


class Ranking(NamedTuple):
    """Ranking of checkpoints.

    Attributes:
        key: Importance of a checkpoint.
        has_rank: Whether a checkpoint is ranked at all; None ranks all checkpoints.
    """

    key: Key
    has_rank: Predicate | None = None

    @classmethod
    def by_meta(cls, name: str, sign: int) -> Ranking:
        """Ranks by a value in ``meta``.

        Args:
            name: Name of the value. Checkpoints without it are not ranked.
            sign: 1 if a higher value is more important, -1 if a lower value is.
        """

        def key(checkpoint: Checkpoint) -> Any:
            value = checkpoint.meta[name]
            return -value if sign < 0 else value

        return cls(key, lambda checkpoint: name in checkpoint.meta)

    @classmethod
    def by_one(
        cls, importance_key: Key | None, max_key: str | None, min_key: str | None
    ) -> Ranking:
        """Ranks by the given key, or by recency if there is none.

        Args:
            importance_key: Function of a checkpoint. The highest value comes first.
            max_key: Name in ``meta``. The highest value comes first.
            min_key: Name in ``meta``. The lowest value comes first.

        Raises:
            ValueError: More than one key was given.
        """
        if sum(key is not None for key in (importance_key, max_key, min_key)) > 1:
            raise ValueError(
                f"importance_key={importance_key}, max_key={max_key!r} and "
                f"min_key={min_key!r} exclude each other. Pass only one of them."
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
        """Returns one ranking for each given key.

        Args:
            importance_keys: Functions of a checkpoint. The highest value comes first.
            max_keys: Names in ``meta``. The highest value comes first.
            min_keys: Names in ``meta``. The lowest value comes first.
        """
        lowest = [cls.by_meta(name, -1) for name in min_keys]
        highest = [cls.by_meta(name, 1) for name in max_keys]
        return [*lowest, *highest, *map(cls, importance_keys)]

    def ranked(
        self, checkpoints: Iterable[Checkpoint], predicate: Predicate | None
    ) -> list[Checkpoint]:
        """Sorts checkpoints.

        Args:
            checkpoints: Checkpoints in any order.
            predicate: Only checkpoints for which it is true are considered.

        Returns:
            The ranked checkpoints, the most important first.
        """
        chosen = filter(predicate, filter(self.has_rank, checkpoints))
        # The second sort is stable: of two equally important ones, the newer comes first.
        newest_first = sorted(chosen, key=ckpt_recency, reverse=True)
        return sorted(newest_first, key=self.key, reverse=True)


def saved_in(folder: Path) -> list[Checkpoint]:
    """Returns all readable checkpoints in a folder, unsorted.

    Args:
        folder: The folder. If it does not exist, the result is empty.
    """
    paths = filter(may_be_checkpoint, folder.iterdir()) if folder.is_dir() else []
    return [found for found in map(checkpoint_in, paths) if found is not None]


def checkpoint_in(path: Path) -> Checkpoint | None:
    """Reads the meta file of a checkpoint.

    Args:
        path: Any path in a folder of checkpoints.

    Returns:
        The checkpoint. None if the path is not a checkpoint, or if its meta file cannot be
        read. In the second case a warning is logged.
    """
    if not (path / METAFNAME).exists():
        return None
    try:
        check_meta(path)
        meta = load_meta(path / METAFNAME)
        files = {f.stem: f for f in path.iterdir() if f.suffix == PARAMFILE_EXT}
        return Checkpoint(path, meta, files)
    except FileNotFoundError:
        # Another process has deleted or replaced the checkpoint.
        return None
    except (CheckpointError, OSError) as error:
        logger.warning("%s is skipped: %s", path, error)
        return None


def average_state_dicts(state_dicts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Averages several states. Only two states are in memory at a time.

    Args:
        state_dicts: The states.

    Returns:
        The mean of the states.

    Raises:
        ValueError: There are no states.
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
    """Averages a recoverable over several checkpoints.

    Args:
        checkpoint_list: The checkpoints.
        recoverable_name: Name of the recoverable.
        parameter_loader: Reads the state from a file.
        averager: Averages the states.
        device: Device of the result, as in SpeechBrain 0.5. By default the states stay on
            the device that ``parameter_loader`` loads them to.

    Returns:
        The result of ``averager``: a state to load.
    """
    files = (checkpoint.paramfiles[recoverable_name] for checkpoint in checkpoint_list)
    return averager(_moved(parameter_loader(path), device) for path in files)


def _moved(state: Any, device: Any) -> Any:
    if device is None or not isinstance(state, dict):
        return state
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in state.items()}
