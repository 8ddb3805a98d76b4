"""Positions counted in examples, to resume an epoch with batches of another size."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from .dataloaders import length_of

State = dict[str, Any]

logger = logging.getLogger(__name__)

# Types of the attributes of a sampler that have no length.
SCALARS = (bool, int, float, str, type(None))


def layout(loader: Any) -> State:
    """Returns how the data of a loader is divided into batches.

    Args:
        loader: Any loader.

    Returns:
        For a list of batches: ``items``, the length of the list. For a DataLoader: ``items``,
        the length of the dataset; ``batch_size``, None if it varies; ``length``, the length of
        the sampler in one process; ``shards``, the number of processes. Empty for a stream.
    """
    if isinstance(loader, Sequence):
        return {"items": len(loader)}
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return {}
    batches = loader.batch_sampler
    fixed = batches is None or type(batches) is BatchSampler
    sampler = getattr(batches, "sampler", None) if fixed and batches else loader.sampler
    return {
        "items": length_of(loader.dataset),
        "batch_size": None if not fixed else getattr(batches, "batch_size", 1),
        "length": length_of(sampler) if fixed else None,
        "shards": _shards(loader.sampler, sampler, batches),
    }


def varies(loader: Any) -> bool:
    """Returns whether batch sizes vary, as with a DynamicBatchSampler.

    Args:
        loader: Any loader.
    """
    found = layout(loader)
    return "batch_size" in found and found["batch_size"] is None


def _shards(*samplers: Any) -> int:
    sharded = (s.num_replicas for s in samplers if isinstance(s, DistributedSampler))
    return next(sharded, 1)


class CountedBatches:
    """Wraps a batch sampler and records the sizes of the batches that are sampled.

    Args:
        sampler: The batch sampler.

    Attributes:
        sizes: Sizes of the batches that were sampled and not yet fetched.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self.sizes: deque[int | None] = deque()

    def __iter__(self) -> Iterator[Any]:
        self.sizes.clear()
        # Not a generator: some samplers use random numbers as soon as iter() is called.
        return map(self._record, iter(self._sampler))

    def __len__(self) -> int:
        return len(self._sampler)

    def _record(self, batch: Any) -> Any:
        self.sizes.append(length_of(batch))
        return batch


class Examples:
    """Counts the examples in the batches of one pass.

    Args:
        loader: Loader that is iterated.
    """

    def __init__(self, loader: Any) -> None:
        self._layout = layout(loader)
        self._sizes: deque[int | None] | None = None
        # None if the number is unknown.
        self._seen: int | None = 0
        self._last: int | None = 0

    def count(self, batches: CountedBatches, skipped: int) -> int | None:
        """Starts to count the batches of a sampler.

        Args:
            batches: Batch sampler that the loader samples from.
            skipped: Number of batches that were already sampled and are not fitted.

        Returns:
            Number of examples in the skipped batches, or None if unknown.
        """
        self._sizes = batches.sizes
        for _ in range(skipped):
            self.fetch()
        return self._seen

    def fetch(self) -> None:
        """Counts a batch. Called for each batch that is fetched."""
        if self._sizes:
            self._last = self._sizes.popleft()
            known = self._seen is not None and self._last is not None
            self._seen = self._seen + self._last if known else None  # type: ignore[operator]

    def state(self, batches: int, ahead: bool) -> State:
        """Returns the state to save along with the number of batches.

        Args:
            batches: Number of batches after which to resume.
            ahead: Whether one more batch was fetched.
        """
        return {"layout": self._layout, "examples": self._examples(batches, ahead)}

    def _examples(self, batches: int, ahead: bool) -> int | None:
        size, length = self._layout.get("batch_size"), self._layout.get("length")
        if size is not None:
            seen: int = batches * size
            return seen if length is None else min(seen, length)
        if self._sizes is None or self._seen is None:
            return None
        return self._seen - (self._last or 0 if ahead else 0)


def skip_examples(batches: Iterator[Any], examples: int) -> tuple[Iterator[Any], int]:
    """Skips batches whose examples are all among the first ``examples``.

    Args:
        batches: Iterator over lists of indices. If the examples end with a batch, no further
            batch is sampled.
        examples: Number of examples to skip, at most.

    Returns:
        The remaining batches and the number of skipped batches.
    """
    skipped = 0
    while examples > 0 and (batch := next(batches, None)) is not None:
        size = length_of(batch)
        size = 1 if size is None else size
        if size > examples:
            return itertools.chain([batch], batches), skipped
        examples -= size
        skipped += 1
    return batches, skipped


def adapt(state: State, loader: Any) -> None:
    """Converts a position to a loader with other batches, so that it is at the same example.

    The position is rounded down to the start of a batch, so that no example is left out.

    Args:
        state: State from ``DataPosition.state``. A state of an earlier version is not changed.
        loader: Loader that was passed to ``fit``.
    """
    saved, now, examples = state.get("layout"), layout(loader), state.get("examples")
    if not saved or not now or saved == now:
        return
    if saved["items"] != now["items"]:
        _forget_order(state)
    if not state.get("batches") or state["over"]:
        return
    if examples is None or "batch_size" not in now:
        warn(state, now, None)
        return
    # Distribute the examples that all processes have seen over the current processes.
    examples = examples * saved["shards"] // now["shards"]
    if now["batch_size"] is None:
        # The batch sizes are unknown, so the warning is logged after the batches are skipped.
        state["skip_examples"] = examples
    else:
        batches, resumed = _whole_batches(examples, now["batch_size"], now["length"])
        warn(state, now, resumed)
        state.update(layout=now, examples=resumed, batches=batches)
        if not batches:
            _restart_pass(state)


def _whole_batches(examples: int, size: int, length: int | None) -> tuple[int, int]:
    """Returns the number of full batches within the first examples, and their examples."""
    if length is not None and examples >= length:
        return -(-length // size), length
    return examples // size, examples // size * size


def warn(state: State, now: State, resumed: int | None) -> None:
    """Warns what has changed since a position was saved, and where the epoch resumes.

    Args:
        state: Position as it was saved.
        now: Current layout of the loader.
        resumed: Number of examples after which the epoch resumes, or None if unknown.
    """
    saved, examples = state["layout"], state["examples"]
    batches = f"{state['batches']} batches"
    logger.warning(
        "The checkpoint was saved after %s of %s. The data now has %s. The epoch resumes "
        "after %s.%s",
        batches if examples is None else examples,
        _words(saved),
        _words(now),
        batches if resumed is None else f"{resumed} of them, at the start of a batch",
        _ORDER if saved["items"] != now["items"] or now.get("batch_size") is None else "",
    )


_ORDER = " If their order differs, some are fitted twice in this epoch, or not at all."


def _words(found: State) -> str:
    if "batch_size" not in found:
        return f"a list of {found['items']} batches"
    count = found["items"] if found["length"] is None else found["length"]
    each = f" for each of {found['shards']} processes" if found["shards"] > 1 else ""
    size = "several sizes" if found["batch_size"] is None else found["batch_size"]
    return f"{count} examples{each} in batches of {size}"


def _restart_pass(state: State) -> None:
    """Moves a position to the start of its pass, with the random state of the start."""
    state.pop("draw")
    state.update(drawn=None, workers={}, next_worker=0)


def _forget_order(state: State) -> None:
    """Removes the indices in the state of a sampler, which may not exist in the data now."""
    samplers: Iterable[State] = state.get("begun", state).get("samplers", [])
    for sampler in samplers:
        kept = sampler.get("changed", {})
        for name in [name for name, value in kept.items() if not isinstance(value, SCALARS)]:
            del kept[name]
