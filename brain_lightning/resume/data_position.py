"""Where training is in its data, and how a pass over the data begins there."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch.utils.data import DataLoader, IterableDataset

from brain_lightning.compat import speechbrain
from brain_lightning.data.dataloaders import SaveableDataLoader, twin

from .random_state import random_state, set_random_state
from .sampler_states import SamplerStates, plain_states
from .worker_states import (
    PLACEHOLDER,
    Carried,
    CarryingCollate,
    IndicesFrom,
    ResumingWorker,
    State,
    WaitingDataset,
    is_placeholder,
    is_stateful,
)

logger = logging.getLogger(__name__)


# Workers that persist belong to one loader for as long as it lives.
_PERSISTENT: WeakKeyDictionary[DataLoader[Any], DataLoader[Any]] = WeakKeyDictionary()


class DataPosition:
    """The position of a run in its training data.

    A pass that is resumed draws the same indices again without loading anything, from
    the random state that it had begun with, and goes on from the state that was saved.

    Attributes:
        fitted: Batches of this pass that training is done with.
        notes_draws: Whether to remember the state before each batch is drawn. Needed
            where a checkpoint may be saved between drawing a batch and fitting it.
    """

    def __init__(self) -> None:
        self.fitted = 0
        self.notes_draws = False
        self._drawn = 0
        # Whether the pass has come to its end: a stream may begin anew where it is asked.
        self._over = False
        self._loader: Any = None
        self._begun: State = {"samplers": []}
        self._samplers: SamplerStates | None = None
        self._noted: State | None = None
        self._resumed: State | None = None
        self._workers: dict[int, State] = {}
        self._next_worker = 0
        # The worker that made the last batch, with its state before.
        self._before: tuple[int, State | None] = (0, None)

    # ------------------------------------------------------------------ saving

    def state(self, fitted: int, drawn: State | None) -> State:
        """What it takes to go on.

        Args:
            fitted: Batches after which to go on.
            drawn: The random state in which to go on with the next batch, if that was
                drawn already; None as drawing leaves it.
        """
        ahead = self._drawn > fitted
        draw = self._noted if ahead and self._noted is not None else self._now()
        next_worker, workers = self._next_worker, dict(self._workers)
        if ahead and workers:
            next_worker, before = self._before
            workers.pop(next_worker)
            workers.update({} if before is None else {next_worker: before})
        return {
            "batches": fitted,
            "begun": {**self._begun, "samplers": plain_states(self._begun["samplers"])},
            "draw": draw,
            "drawn": drawn if ahead else None,
            "over": self._over and not ahead,
            "workers_persisted": self._begun.get("workers_persisted", False),
            "workers": workers,
            "next_worker": next_worker,
            "num_workers": getattr(self._loader, "num_workers", 0),
        }

    def state_between_passes(self) -> State:
        """What it takes to begin the next pass as it would have begun."""
        persistent = getattr(self._loader, "persistent_workers", False)
        return {
            "samplers": [] if self._samplers is None else plain_states(self._samplers.now()),
            "workers": self._workers if persistent else {},
            "workers_persisted": _persist(self._loader),
            "num_workers": getattr(self._loader, "num_workers", 0),
        }

    def resume(self, state: State, loader: Any) -> None:
        """Lets the next pass begin where the state says.

        Args:
            state: From ``state`` or ``state_between_passes``.
            loader: What ``fit`` was given; its sampler is told the epoch later.
        """
        self._resumed = state
        self._states_of(loader).resume(state.get("samplers", []))

    def _states_of(self, loader: Any) -> SamplerStates:
        if self._samplers is None or self._samplers.loader is not loader:
            self._samplers = SamplerStates(loader)
        return self._samplers

    def _now(self) -> State:
        return {"random": random_state(), **_state_of_stream(self._loader)}

    # --------------------------------------------------------------- iterating

    def batches(self, loader: Any) -> Iterator[Any]:
        """One pass over the training data, from the position that was resumed.

        Args:
            loader: What ``fit`` was given.

        Yields:
            The batches.
        """
        resumed, self._resumed = self._resumed, None
        resumed = resumed or {}
        iterator = self._begin(loader, resumed)
        self._over, drawn = resumed.get("over", False), resumed.get("drawn")
        while not self._over:
            if self.notes_draws:
                self._noted = self._now()
            try:
                batch = self._draw(iterator)
            except StopIteration:
                self._over = True
                return
            if drawn is not None:
                set_random_state(drawn)
                drawn = None
            yield batch

    def _draw(self, iterator: Iterator[Any]) -> Any:
        item = next(iterator)
        while isinstance(item, Carried) and is_placeholder(item.batch):
            item = next(iterator)
        self._drawn += 1
        if not isinstance(item, Carried):
            return item
        self._before = (item.worker, self._workers.get(item.worker))
        self._workers[item.worker] = item.state
        self._next_worker = (item.worker + 1) % self._loader.num_workers
        return item.batch

    def _begin(self, loader: Any, resumed: State) -> Iterator[Any]:
        self._loader, self._noted = loader, None
        samplers, begun = self._states_of(loader), resumed.get("begun")
        if begun is not None:
            set_random_state(begun["random"])
            samplers.resume(begun["samplers"])
        self._begun = {
            "random": random_state(),
            "samplers": samplers.now(),
            "workers_persisted": resumed.get("workers_persisted", _persist(loader)),
        }
        told = _told_position(loader, self)
        self.fitted = self._drawn = resumed.get("batches", told)
        iterator = self._iterator(loader, resumed)
        if "draw" in resumed:
            set_random_state(resumed["draw"]["random"])
        return iterator

    def _iterator(self, loader: Any, resumed: State) -> Iterator[Any]:
        draw = resumed.get("draw", {})
        if "loader" in draw:
            loader.load_state_dict(draw["loader"])
            return iter(loader)
        if "dataset" in draw:
            loader.dataset.load_state_dict(draw["dataset"])
        if not _is_data_loader(loader):
            return self._sequence(loader)
        if _is_stream(loader) and not is_stateful(loader.dataset):
            self._tell_if_it_begins_anew(loader.dataset)
        self._resume_workers(loader, resumed)
        if self._drawn or loader.num_workers:
            return self._twins_iterator(loader, resumed)
        return iter(loader)

    def _sequence(self, loader: Any) -> Iterator[Any]:
        if isinstance(loader, Sequence):
            return itertools.islice(loader, self._drawn, None)
        self._tell_if_it_begins_anew(loader)
        return iter(loader)

    def _tell_if_it_begins_anew(self, data: Any) -> None:
        if self._drawn:
            logger.warning(
                "%s has no position that can be restored: the resumed epoch begins with its "
                "first item, after %d batches. Give it state_dict() and load_state_dict(), "
                "or use a dataset with indices.",
                type(data).__name__,
                self._drawn,
            )
        self.fitted = self._drawn = 0

    def _resume_workers(self, loader: DataLoader[Any], resumed: State) -> None:
        if not loader.persistent_workers:
            self._workers = {}
        self._next_worker = 0
        if resumed and resumed["num_workers"] != loader.num_workers:
            logger.warning(
                "The checkpoint was saved with num_workers=%d, and there are %d now: what "
                "they draw at random differs.",
                resumed["num_workers"],
                loader.num_workers,
            )
        elif resumed:
            self._workers = dict(resumed["workers"])
            self._next_worker = resumed.get("next_worker", 0) if self._drawn else 0

    def _twins_iterator(self, loader: DataLoader[Any], resumed: State) -> Iterator[Any]:
        """A copy is iterated: the user's loader stays as it is."""
        new = None if resumed else _PERSISTENT.get(loader)
        if new is None:
            new = self._twin(loader, bool(resumed))
        if loader.persistent_workers:
            _PERSISTENT[loader] = new
        iterator = iter(new)
        for sampler in (new.batch_sampler, new.sampler):
            if isinstance(sampler, IndicesFrom):
                sampler.skip()
        speechbrain.follow_iterator(loader, iterator, self._drawn - self._next_worker)
        return iterator

    def _twin(self, loader: DataLoader[Any], resumed: bool) -> DataLoader[Any]:
        changes: dict[str, Any] = {}
        if loader.num_workers:
            states = dict(self._workers)
            changes["collate_fn"] = CarryingCollate(loader.collate_fn)
            changes["worker_init_fn"] = ResumingWorker(loader.worker_init_fn, states)
        waiting, batched = self._next_worker, loader.batch_sampler is not None
        streamed = _is_stream(loader)
        if waiting:
            changes["dataset"] = WaitingDataset(loader.dataset, waiting)
        before: list[Any] = [[PLACEHOLDER] if batched else PLACEHOLDER] * waiting
        name, skip = "batch_sampler" if batched else "sampler", 0 if streamed else self._drawn
        # Workers that persist begin a pass without the random number that new ones need.
        persisted = resumed and self._begun["workers_persisted"]
        random = self._begun["random"] if persisted else None
        changes[name] = IndicesFrom(getattr(loader, name), skip, before, random)
        new = twin(loader, **changes)
        speechbrain.forget_position(new)
        return new


def _told_position(loader: Any, position: DataPosition) -> int:
    """The position of a loader that a Checkpointer has recovered."""
    if isinstance(loader, SaveableDataLoader):
        loader.position = position
        told, loader.recovered = loader.recovered, 0
        return told
    return speechbrain.told_position(loader)


def _is_data_loader(loader: Any) -> bool:
    """Whether it iterates as DataLoader does, or as SpeechBrain's."""
    if not isinstance(loader, DataLoader):
        return False
    ours = type(loader).__iter__ is DataLoader.__iter__
    return ours or speechbrain.is_saveable_loader(loader)


def _persist(loader: Any) -> bool:
    """Whether the workers of a loader are there, and stay for its next pass."""
    return isinstance(loader, DataLoader) and loader in _PERSISTENT


def _is_stream(loader: DataLoader[Any]) -> bool:
    return isinstance(loader.dataset, IterableDataset)


def _state_of_stream(loader: Any) -> State:
    """Of what is not drawn by indices: the loader itself, or its dataset."""
    if is_stateful(loader):
        return {"loader": loader.state_dict()}
    dataset: Any = getattr(loader, "dataset", None)
    in_workers = getattr(loader, "num_workers", 0)
    if is_stateful(dataset) and not in_workers:
        return {"dataset": dataset.state_dict()}
    return {}
