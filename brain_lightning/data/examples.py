"""A position in examples: where a pass resumes if its batches have another size by now."""

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

# What changes in a sampler and is of no length.
SCALARS = (bool, int, float, str, type(None))


def layout(loader: Any) -> State:
    """How the data of a loader are divided into batches.

    Args:
        loader: Any loader.

    Returns:
        ``items`` of the dataset, or of a list of batches. Of a DataLoader also the
        ``batch_size``, None where it varies; the ``length`` of the sampler, for one
        process; and the number of ``shards``, one for each process. Nothing for a stream.
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
    """Whether the batches of a loader are of several sizes, as of a DynamicBatchSampler.

    Args:
        loader: Any loader.
    """
    found = layout(loader)
    return "batch_size" in found and found["batch_size"] is None


def _shards(*samplers: Any) -> int:
    sharded = (s.num_replicas for s in samplers if isinstance(s, DistributedSampler))
    return next(sharded, 1)


class CountedBatches:
    """The batches of a batch sampler, whose sizes are recorded as they are drawn.

    Args:
        sampler: The batch sampler.

    Attributes:
        sizes: Of batches that were drawn, and not yet taken.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self.sizes: deque[int | None] = deque()

    def __iter__(self) -> Iterator[Any]:
        self.sizes.clear()
        # Not in a generator: some samplers draw random numbers when they are iterated.
        return map(self._record, iter(self._sampler))

    def __len__(self) -> int:
        return len(self._sampler)

    def _record(self, batch: Any) -> Any:
        self.sizes.append(length_of(batch))
        return batch


class Examples:
    """The number of examples in the batches of one pass.

    Args:
        loader: What is iterated.
    """

    def __init__(self, loader: Any) -> None:
        self._layout = layout(loader)
        self._sizes: deque[int | None] | None = None
        # None where nobody can tell.
        self._seen: int | None = 0
        self._last: int | None = 0

    def count(self, batches: CountedBatches, skipped: int) -> int | None:
        """Counts the batches that are drawn from now on.

        Args:
            batches: What the loader draws from.
            skipped: The number of batches that were drawn and are not fitted.

        Returns:
            The number of examples in those.
        """
        self._sizes = batches.sizes
        for _ in range(skipped):
            self.fetch()
        return self._seen

    def fetch(self) -> None:
        """Called for each batch that was fetched."""
        if self._sizes:
            self._last = self._sizes.popleft()
            known = self._seen is not None and self._last is not None
            self._seen = self._seen + self._last if known else None  # type: ignore[operator]

    def state(self, batches: int, ahead: bool) -> State:
        """What to save beside the number of batches.

        Args:
            batches: The number of batches after which to resume.
            ahead: Whether one more was fetched.
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
    """Skips batches as long as all of their examples are among the first ones.

    Args:
        batches: Of indices. No more are drawn than have to be skipped, where the examples
            end with a batch.
        examples: How many examples to skip, at most.

    Returns:
        The batches that follow, and the number of those that were skipped.
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
    """Changes a position to be the same one, in examples, in a loader with other batches.

    It is rounded down to where a batch begins, so that no example is left out.

    Args:
        state: From ``DataPosition.state``; one of an earlier version stays as it is.
        loader: What ``fit`` was given.
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
    # What all processes have seen is shared out again.
    examples = examples * saved["shards"] // now["shards"]
    if now["batch_size"] is None:
        # It is told where the batches have been skipped, and their sizes are known.
        state["skip_examples"] = examples
    else:
        batches, resumed = _whole_batches(examples, now["batch_size"], now["length"])
        warn(state, now, resumed)
        state.update(layout=now, examples=resumed, batches=batches)
        if not batches:
            _begin_anew(state)


def _whole_batches(examples: int, size: int, length: int | None) -> tuple[int, int]:
    """How many batches hold no more than so many examples, and how many they hold."""
    if length is not None and examples >= length:
        return -(-length // size), length
    return examples // size, examples // size * size


def warn(state: State, now: State, resumed: int | None) -> None:
    """Says what has changed since a position was saved, and where the pass resumes.

    Args:
        state: The position as it was saved.
        now: The layout of the loader.
        resumed: The number of examples after which the pass resumes, where it is known.
    """
    saved, examples = state["layout"], state["examples"]
    batches = f"{state['batches']} batches"
    logger.warning(
        "The checkpoint was saved after %s of %s; now the data are %s. The epoch is resumed "
        "after %s.%s",
        batches if examples is None else examples,
        _words(saved),
        _words(now),
        batches if resumed is None else f"{resumed} of them, where a batch begins",
        _ORDER if saved["items"] != now["items"] or now.get("batch_size") is None else "",
    )


_ORDER = " Where their order differs, some are fitted twice in this epoch, or not at all."


def _words(found: State) -> str:
    if "batch_size" not in found:
        return f"a list of {found['items']} batches"
    count = found["items"] if found["length"] is None else found["length"]
    each = f" for each of {found['shards']} processes" if found["shards"] > 1 else ""
    size = "several sizes" if found["batch_size"] is None else found["batch_size"]
    return f"{count} examples{each} in batches of {size}"


def _begin_anew(state: State) -> None:
    """Makes a position the beginning of its pass, with the random state of then."""
    state.pop("draw")
    state.update(drawn=None, workers={}, next_worker=0)


def _forget_order(state: State) -> None:
    """Leaves out the indices that a sampler has kept, which may not be in the data now."""
    samplers: Iterable[State] = state.get("begun", state).get("samplers", [])
    for sampler in samplers:
        kept = sampler.get("changed", {})
        for name in [name for name, value in kept.items() if not isinstance(value, SCALARS)]:
            del kept[name]
