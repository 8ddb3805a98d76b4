"""What the workers of a DataLoader do so that their random numbers can be resumed.

Each batch brings the state of the worker that made it along, for a worker is
several batches ahead of the training.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch.utils.data import get_worker_info

from .random_state import random_state, set_random_state

State = dict[str, Any]


class Carried(NamedTuple):
    """A batch as a worker sends it.

    Attributes:
        batch: What the loader's ``collate_fn`` made; ``PLACEHOLDER`` for no batch.
        worker: The number of the worker.
        state: The worker's state, once the batch was made.
    """

    batch: Any
    worker: int
    state: State


# Sent by a worker that waits for its turn: batches come from the workers by turns, and the
# first of a resumed pass may not be the first worker's.
PLACEHOLDER = "brain_lightning: no batch"


def is_stateful(obj: object) -> bool:
    """Whether an object can say where it is, and go back there.

    Args:
        obj: A loader, a dataset or a sampler.
    """
    return hasattr(obj, "state_dict") and hasattr(obj, "load_state_dict")


def worker_state(dataset: Any) -> State:
    """The state of this process, and of its copy of the dataset.

    Args:
        dataset: The dataset that it reads.
    """
    state: State = {"random": random_state()}
    if is_stateful(dataset):
        state["dataset"] = dataset.state_dict()
    return state


class CarryingCollate:
    """A ``collate_fn`` whose batches carry the state of their worker.

    Args:
        collate_fn: The loader's own.
    """

    def __init__(self, collate_fn: Callable[[Any], Any]) -> None:
        self._collate_fn = collate_fn

    def __call__(self, samples: Any) -> Carried:
        """Collates the samples of a batch, or passes a placeholder on."""
        worker = get_worker_info()
        assert worker is not None
        if is_placeholder(samples):
            return Carried(PLACEHOLDER, worker.id, {})
        batch = self._collate_fn(samples)
        return Carried(batch, worker.id, worker_state(worker.dataset))


def is_placeholder(samples: Any) -> bool:
    """Whether a worker has sent, or is to send, no batch.

    Args:
        samples: Indices, samples or a batch.
    """
    if isinstance(samples, list) and len(samples) == 1:
        samples = samples[0]
    return isinstance(samples, str) and samples == PLACEHOLDER


class ResumingWorker:
    """A ``worker_init_fn`` that gives each worker the state that it had.

    Args:
        worker_init_fn: The loader's own.
        states: By the number of the worker; one without is new.
    """

    def __init__(
        self, worker_init_fn: Callable[[int], None] | None, states: Mapping[int, State]
    ) -> None:
        self._worker_init_fn = worker_init_fn
        self._states = states

    def __call__(self, worker: int) -> None:
        """Prepares a worker that has just started."""
        info = get_worker_info()
        assert info is not None
        if isinstance(info.dataset, WaitingDataset):
            # A worker_init_fn may set attributes of its dataset; torch refuses assignments.
            object.__setattr__(info, "dataset", info.dataset.waiting_dataset)
        if self._worker_init_fn is not None:
            self._worker_init_fn(worker)
        state = self._states.get(worker)
        if state is None:
            return
        if "dataset" in state:
            dataset: Any = info.dataset
            dataset.load_state_dict(state["dataset"])
        set_random_state(state["random"])


class WaitingDataset:
    """A dataset whose first workers have a placeholder to send before their data.

    Args:
        dataset: The dataset.
        waiting: How many workers have to wait for their turn.
    """

    def __init__(self, dataset: Any, waiting: int) -> None:
        self.waiting_dataset = dataset
        self._waiting = waiting

    def __getitem__(self, index: Any) -> Any:
        return index if isinstance(index, str) else self.waiting_dataset[index]

    @property
    def __getitems__(self) -> Any:
        """Torch asks for it first, and does without where it is None."""
        items = getattr(self.waiting_dataset, "__getitems__", None)
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
        yield from self.waiting_dataset


class IndicesFrom(Iterator[Any]):
    """What a sampler draws from a position on, once; nothing is loaded before it.

    Args:
        sampler: A sampler or a batch sampler.
        position: How many to leave out.
        before: What to draw in their place.
        random: The random state to draw them from, where it is not the one at hand.
    """

    def __init__(
        self, sampler: Iterable[Any], position: int, before: list[Any], random: State | None
    ) -> None:
        self._random = random
        self._sampler = sampler
        self._position = position
        self._before = before
        self._indices: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        # Persistent workers begin a second pass with the sampler of the first.
        return self if self._indices is None else iter(self._sampler)

    def __next__(self) -> Any:
        return next(self.skip())

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]

    def skip(self) -> Iterator[Any]:
        """Draws and drops what comes before the position.

        A sampler draws random numbers when it is first asked, which is after the
        DataLoader has drawn its own.
        """
        if self._indices is None:
            if self._random is not None:
                set_random_state(self._random)
            indices = iter(self._sampler)
            next(itertools.islice(indices, self._position, self._position), None)
            self._indices = itertools.chain(self._before, indices)
        return self._indices
