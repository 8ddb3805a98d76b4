"""Finds the largest batch size that fits into memory (Lightning's ``scale_batch_size``)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.memory import garbage_collection_cuda

from brain_lightning.data.batch_size import BatchSize
from brain_lightning.distributed.communication import gather
from brain_lightning.errors import UnsupportedError
from brain_lightning.stages.run import Run
from brain_lightning.step.out_of_memory import is_out_of_memory

from .longest import longest_batches
from .trial import Trial

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Search:
    """Arguments of a search, as in ``Tuner.scale_batch_size``.

    Attributes:
        mode: ``power`` doubles the size until memory is exhausted. ``binsearch`` then bisects
            the interval between the last two sizes.
        steps_per_trial: Number of batches to run with each size.
        init_val: First size in examples. A search for ``max_batch_length`` starts with its
            current value instead.
        max_trials: Maximum number of sizes to try.
        margin: Fraction by which ``binsearch`` reduces its result.
        max_val: Largest size in examples. Not used for ``max_batch_length``.
    """

    mode: str = "power"
    steps_per_trial: int = 3
    init_val: int = 2
    max_trials: int = 25
    margin: float = 0.05
    max_val: int = 8192


def find(run: Run, trainer: Trainer, loader: Any, search: Search) -> float:
    """Searches for the largest batch size in a trial. The DataLoader itself is not changed.

    Args:
        run: The run, between two batches.
        trainer: The Trainer that runs it.
        loader: DataLoader of the run. Batches of the training set are fitted, other batches
            are evaluated.
        search: Arguments of the search.

    Returns:
        The batch size, or the ``max_batch_length`` of a DynamicBatchSampler.

    Raises:
        UnsupportedError: The batch size of the DataLoader cannot be changed, or the smallest
            batch does not fit into memory.
    """
    size = BatchSize(loader)
    with Trial(run, trainer, loader) as trial:
        fits = _Fits(trial, loader, size, trainer.training, search.steps_per_trial)
        first, limit = size.current, size.largest
        if size.name == "batch_size":
            first, limit = search.init_val, min(limit, search.max_val)
        found = _largest(fits, min(first, limit), limit, search)
    logger.info("The largest %s that fits into memory is %g.", size.name, found)
    return found


class _Fits:
    """Checks whether a batch size fits into memory on all ranks.

    Args:
        trial: The trial.
        loader: The DataLoader.
        size: Accessor of the DataLoader's batch size.
        trains: Whether to fit the batches. Otherwise they are evaluated.
        steps: Number of batches to run.
    """

    def __init__(
        self, trial: Trial, loader: Any, size: BatchSize, trains: bool, steps: int
    ) -> None:
        self._trial, self._loader, self._size = trial, loader, size
        self._trains, self._steps = trains, steps
        self.tried = 0

    def __call__(self, size: float) -> bool:
        self.tried += 1
        self._size.set(size)
        garbage_collection_cuda()
        fits = all(gather(self._runs()))
        logger.info("%s %g: %s", self._size.name, size, "fits" if fits else "does not fit")
        return fits

    def _runs(self) -> bool:
        trial = self._trial
        step: Callable[[Any], float] = trial.fit if self._trains else trial.evaluate
        batches = 0
        try:
            if self._trains:
                trial.start()
            for batch in islice(self._longest(), self._steps):
                step(batch)
                batches += 1
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or (self._trains and not trial.fails_together):
                raise
            return False
        # With drop_last there may be no batch.
        return batches > 0

    def _longest(self) -> Iterator[Any]:
        """Yields the batches that need most memory, again and again."""
        longest = longest_batches(self._loader)
        while longest.count:
            yield from islice(self._trial.batches(longest.loader), longest.count)


def _largest(fits: _Fits, first: float, limit: float, search: Search) -> float:
    low, high, size = 0.0, None, first
    while fits.tried < search.max_trials:
        if fits(size):
            low = size
            if size >= limit or (high is not None and search.mode == "power"):
                break
        elif size <= 1:
            raise UnsupportedError(
                "the smallest batch does not fit into memory. Use a smaller model, or remove "
                "the longest examples."
            )
        else:
            high = size
        if high is None:
            size = min(2 * size, limit)
        elif low == 0:
            size = max(1.0, high // 2)
        elif search.mode == "power" or high - low <= max(1, _SMALLEST_PART * low):
            break
        else:
            size = (low + high) // 2
    if low == 0:
        raise UnsupportedError(
            f"none of the {fits.tried} tried sizes fits into memory. The first one was "
            f"{first:g}. Use a smaller init_val, or increase max_trials."
        )
    return max(1, int(low * (1 - search.margin))) if search.mode == "binsearch" else low


# The search for a length in seconds or frames stops at this relative precision.
_SMALLEST_PART = 0.01
