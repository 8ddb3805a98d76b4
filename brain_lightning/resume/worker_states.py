"""The states of DataLoader workers: sent with each batch, restored when workers start.

A worker is several batches ahead of the training. Therefore each batch brings the state that
its worker had after the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch.utils.data import get_worker_info

from brain_lightning.data.examples import skip_examples

from .plain_values import State
from .random_state import random_state, set_random_state


class WorkerBatch(NamedTuple):
    """A batch as a worker sends it.

    Attributes:
        batch: Result of the loader's ``collate_fn``; ``PLACEHOLDER`` if there is no batch.
        worker: Id of the worker.
        state: State of the worker after it made the batch.
    """

    batch: Any
    worker: int
    state: State


# Sent by workers before the first batch of a resumed pass: workers take turns, and the turn of
# the first batch may not be worker 0's.
PLACEHOLDER = "brain_lightning: no batch"


def is_stateful(obj: object) -> bool:
    """Whether an object has ``state_dict`` and ``load_state_dict``.

    Args:
        obj: A loader, a dataset or a sampler.
    """
    return hasattr(obj, "state_dict") and hasattr(obj, "load_state_dict")


def collate_with_state(collate_fn: Callable[[Any], Any], samples: Any) -> WorkerBatch:
    """Collates the samples of a batch, and adds the state of the worker.

    Args:
        collate_fn: The loader's ``collate_fn``.
        samples: Samples of the batch, or a placeholder, which is returned.
    """
    worker: Any = get_worker_info()
    if is_placeholder(samples):
        return WorkerBatch(PLACEHOLDER, worker.id, {})
    batch = collate_fn(samples)
    state = {"random": random_state(), **dataset_state(worker)}
    return WorkerBatch(batch, worker.id, state)


def dataset_state(owner: Any) -> State:
    """Returns the state of a dataset; empty if the dataset has no state.

    Args:
        owner: Object with the dataset: a loader, or torch's worker info.
    """
    dataset: Any = getattr(owner, "dataset", None)
    return {"dataset": dataset.state_dict()} if is_stateful(dataset) else {}


def is_placeholder(samples: Any) -> bool:
    """Whether the argument is a placeholder instead of a batch.

    Args:
        samples: Indices, samples or a batch.
    """
    if isinstance(samples, list) and len(samples) == 1:
        samples = samples[0]
    return isinstance(samples, str) and samples == PLACEHOLDER


def restore_worker(
    worker_init_fn: Callable[[int], None] | None, states: Mapping[int, State], worker: int
) -> None:
    """Restores the state of a worker that has just started.

    Args:
        worker_init_fn: The loader's ``worker_init_fn``.
        states: States by worker id. A worker without a state is not changed.
        worker: Id of this worker.
    """
    info: Any = get_worker_info()
    if isinstance(info.dataset, PlaceholderDataset):
        # A worker_init_fn may change the user's dataset. torch forbids plain assignment here.
        object.__setattr__(info, "dataset", info.dataset.dataset)
    if worker_init_fn is not None:
        worker_init_fn(worker)
    if state := states.get(worker):
        if "dataset" in state:
            info.dataset.load_state_dict(state["dataset"])
        set_random_state(state["random"])


class PlaceholderDataset:
    """A dataset whose first workers send a placeholder before their data.

    Args:
        dataset: The dataset.
        waiting: Number of workers that send a placeholder.
    """

    def __init__(self, dataset: Any, waiting: int) -> None:
        self.dataset = dataset
        self._waiting = waiting

    def __getitem__(self, index: Any) -> Any:
        return index if isinstance(index, str) else self.dataset[index]

    @property
    def __getitems__(self) -> Any:
        """Method that torch prefers to ``__getitem__``, unless it is None."""
        items = getattr(self.dataset, "__getitems__", None)
        if items is None:
            return None
        return lambda indices: indices if is_placeholder(indices) else items(indices)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        waits = worker is not None and worker.id < self._waiting
        # In the second pass with persistent workers, no placeholders are needed.
        self._waiting = 0
        if waits:
            yield PLACEHOLDER
        yield from self.dataset


class SkippingSampler(Iterator[Any]):
    """The indices of a sampler from a position on, in the first pass only.

    No data are loaded for the skipped indices.

    Args:
        sampler: A sampler or a batch sampler.
        position: Number of indices, or of batches of indices, to skip.
        before: Items to yield before the remaining indices.
        random: Random state to start with; None for the current random state.
        examples: Largest number of examples to skip, instead of ``position``.

    Attributes:
        sampler: The sampler.
        skipped: Number of indices, or of batches of indices, that were skipped.
    """

    def __init__(
        self,
        sampler: Iterable[Any],
        position: int,
        before: list[Any],
        random: State | None,
        examples: int | None = None,
    ) -> None:
        self._random = random
        self.sampler = sampler
        self.skipped = position
        self._examples = examples
        self._before = before
        self._indices: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        # Persistent workers use the same sampler in the second pass.
        return self if self._indices is None else iter(self.sampler)

    def __next__(self) -> Any:
        return next(self.skip())

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def skip(self) -> Iterator[Any]:
        """Skips the indices before the position, if they were not skipped before.

        This is done at the first index, and not earlier: then a sampler draws its random
        numbers, after the DataLoader has drawn its own.

        Returns:
            Iterator over the remaining indices.
        """
        if self._indices is None:
            if self._random is not None:
                set_random_state(self._random)
            indices = iter(self.sampler)
            if self._examples is None:
                next(itertools.islice(indices, self.skipped, self.skipped), None)
            else:
                indices, self.skipped = skip_examples(indices, self._examples)
            self._indices = itertools.chain(self._before, indices)
        return self._indices
