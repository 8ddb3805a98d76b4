"""The states of a DataLoader's workers: sent with each batch, restored when workers start.

A worker is several batches ahead of the training, so its state at a batch is known only
if the batch brings it along.
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
        batch: What the loader's ``collate_fn`` made; ``PLACEHOLDER`` for no batch.
        worker: The number of the worker.
        state: The worker's state after it made the batch.
    """

    batch: Any
    worker: int
    state: State


# Sent by a worker whose turn has not come: the workers take turns, and the first batch of a
# resumed pass may not be the first worker's.
PLACEHOLDER = "brain_lightning: no batch"


def is_stateful(obj: object) -> bool:
    """Whether an object can save its state and restore it.

    Args:
        obj: A loader, a dataset or a sampler.
    """
    return hasattr(obj, "state_dict") and hasattr(obj, "load_state_dict")


def collate_with_state(collate_fn: Callable[[Any], Any], samples: Any) -> WorkerBatch:
    """Collates the samples of a batch, and adds the state of the worker.

    Args:
        collate_fn: The loader's.
        samples: What the batch is made of, or a placeholder, which is passed on.
    """
    worker: Any = get_worker_info()
    if is_placeholder(samples):
        return WorkerBatch(PLACEHOLDER, worker.id, {})
    batch = collate_fn(samples)
    state = {"random": random_state(), **dataset_state(worker)}
    return WorkerBatch(batch, worker.id, state)


def dataset_state(owner: Any) -> State:
    """The state of a dataset that has one.

    Args:
        owner: A loader, or what torch says of a worker.
    """
    dataset: Any = getattr(owner, "dataset", None)
    return {"dataset": dataset.state_dict()} if is_stateful(dataset) else {}


def is_placeholder(samples: Any) -> bool:
    """Whether a worker has sent, or is to send, no batch.

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
        worker_init_fn: The loader's.
        states: By the number of the worker; one without is new.
        worker: The number of this one.
    """
    info: Any = get_worker_info()
    if isinstance(info.dataset, PlaceholderDataset):
        # A worker_init_fn may set attributes of its dataset; torch refuses assignments.
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
        waiting: How many workers have to wait for their turn.
    """

    def __init__(self, dataset: Any, waiting: int) -> None:
        self.dataset = dataset
        self._waiting = waiting

    def __getitem__(self, index: Any) -> Any:
        return index if isinstance(index, str) else self.dataset[index]

    @property
    def __getitems__(self) -> Any:
        """Torch looks it up first, and does without it where it is None."""
        items = getattr(self.dataset, "__getitems__", None)
        if items is None:
            return None
        return lambda indices: indices if is_placeholder(indices) else items(indices)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        waits = worker is not None and worker.id < self._waiting
        # Persistent workers begin a second pass, in which nobody has to wait.
        self._waiting = 0
        if waits:
            yield PLACEHOLDER
        yield from self.dataset


class SkippingSampler(Iterator[Any]):
    """The indices of a sampler from a position on; the first pass over it only.

    Nothing is loaded for the indices before the position.

    Args:
        sampler: A sampler or a batch sampler.
        position: How many indices, or batches of indices, to skip.
        before: What to yield before those that follow.
        random: The random state to begin with, where it is not the current one.
        examples: How many examples to skip at most, in place of ``position``.

    Attributes:
        sampler: The sampler.
        skipped: How many were skipped, once they are.
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
        # Persistent workers begin a second pass with the sampler of the first.
        return self if self._indices is None else iter(self.sampler)

    def __next__(self) -> Any:
        return next(self.skip())

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def skip(self) -> Iterator[Any]:
        """Skips what comes before the position, if that is still to be done.

        A sampler draws random numbers at its first index, which is after the DataLoader
        has drawn its own.

        Returns:
            The indices that follow.
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
