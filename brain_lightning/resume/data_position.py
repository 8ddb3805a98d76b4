"""The position of training in its data, and how a pass over the data resumes there."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch.utils.data import DataLoader, IterableDataset

from brain_lightning.compat import speechbrain
from brain_lightning.data.dataloaders import SaveableDataLoader, twin
from brain_lightning.data.examples import CountedBatches, Examples, adapt, layout, varies, warn

from . import worker_states as workers
from .plain_values import State
from .random_state import random_state, set_random_state
from .sampler_states import SamplerStates, plain_states

logger = logging.getLogger(__name__)


# Persistent workers belong to the copy of one loader, for as long as that loader exists.
_PERSISTENT: WeakKeyDictionary[DataLoader[Any], DataLoader[Any]] = WeakKeyDictionary()


class DataPosition:
    """The position of a run in its training data.

    A pass that is resumed first takes the same indices from the sampler again, with the
    random state that the pass had begun with and without loading anything, and then
    restores the state that was saved.

    Attributes:
        fitted: Batches of this pass that have been fitted.
        records_fetches: Whether to record the state before each batch is fetched. Needed
            where a checkpoint may be saved between fetching a batch and fitting it.
    """

    def __init__(self) -> None:
        self.fitted = 0
        self.records_fetches = False
        self._fetched = 0
        # Whether the next batch is being fetched, or could not be.
        self._fetching = False
        # Whether the pass has ended: a stream that is asked again may start again.
        self._over = False
        self._loader: Any = None
        self._examples = Examples(None)
        self._begun: State = {"samplers": []}
        self._samplers = SamplerStates(None)
        self._before_fetch: State | None = None
        self._resumed: State | None = None
        # By the number of the worker; never changed, but replaced.
        self._workers: dict[int, State] = {}
        self._next_worker = 0
        # The worker that made the last batch, and the states before that.
        self._before = (0, self._workers)

    # ------------------------------------------------------------------ saving

    def state(self, fitted: int, after_fetch: State | None) -> State:
        """The state to resume from, within a pass.

        Args:
            fitted: The number of batches after which to resume.
            after_fetch: The random state with which to fit the next batch, if that was
                fetched already; None for the state that fetching it leaves.
        """
        ahead = self._fetched > fitted
        begun = ahead or self._fetching
        draw = self._before_fetch if begun and self._before_fetch is not None else self._now()
        next_worker, states = self._next_worker, self._workers
        if ahead and states:
            next_worker, states = self._before
        return {
            "batches": fitted,
            **self._examples.state(fitted, ahead),
            "begun": {**self._begun, "samplers": plain_states(self._begun["samplers"])},
            "draw": draw,
            "drawn": after_fetch if ahead else None,
            "over": self._over and not ahead,
            "workers_persisted": self._begun.get("workers_persisted", False),
            "workers": states,
            "next_worker": next_worker,
            "num_workers": getattr(self._loader, "num_workers", 0),
        }

    def can_fetch_again(self) -> bool:
        """Whether the batch that was fetched last could be fetched again, and be the same."""
        return self._before_fetch is not None

    def state_between_passes(self) -> State:
        """The state to resume from before the next pass."""
        if self._resumed is not None and "begun" not in self._resumed:
            # What was restored has not taken effect.
            return self._resumed
        persistent = getattr(self._loader, "persistent_workers", False)
        return {
            "samplers": plain_states(self._samplers.now()),
            "workers": self._workers if persistent else {},
            "workers_persisted": _persist(self._loader),
            "num_workers": getattr(self._loader, "num_workers", 0),
            "layout": _layout(self._loader),
        }

    def resume(self, state: State, loader: Any) -> None:
        """Restores a state, which takes effect in the next pass.

        Args:
            state: From ``state`` or ``state_between_passes``. It is changed where the
                batches of the loader are not those that it was saved with.
            loader: What ``fit`` was given; the epoch of its sampler is set later.
        """
        if _layout(loader):
            adapt(state, loader)
        self._resumed = state
        self._states_of(loader).resume(state.get("samplers", []))

    def _states_of(self, loader: Any) -> SamplerStates:
        if self._samplers.loader is not loader:
            self._samplers = SamplerStates(loader)
        return self._samplers

    def _now(self) -> State:
        return {"random": random_state(), **_state_of_stream(self._loader)}

    # --------------------------------------------------------------- iterating

    def batches(self, loader: Any) -> Iterator[Any]:
        """One pass over the training data, from the resumed position on.

        Args:
            loader: What ``fit`` was given.

        Yields:
            The batches.
        """
        resumed, self._resumed = self._resumed or {}, None
        iterator = self._begin(loader, resumed)
        self._over, after_fetch = resumed.get("over", False), resumed.get("drawn")
        while not self._over:
            if self.records_fetches:
                self._before_fetch = self._now()
            self._fetching = True
            try:
                batch = self._fetch(iterator)
            except StopIteration:
                self._over, self._fetching = True, False
                return
            self._fetching = False
            if after_fetch is not None:
                set_random_state(after_fetch)
                after_fetch = None
            yield batch

    def _fetch(self, iterator: Iterator[Any]) -> Any:
        item = next(iterator)
        while isinstance(item, workers.WorkerBatch) and workers.is_placeholder(item.batch):
            item = next(iterator)
        self._fetched += 1
        self._examples.fetch()
        if not isinstance(item, workers.WorkerBatch):
            return item
        self._before = (item.worker, self._workers)
        self._workers = {**self._workers, item.worker: item.state}
        self._next_worker = (item.worker + 1) % self._loader.num_workers
        return item.batch

    def _begin(self, loader: Any, resumed: State) -> Iterator[Any]:
        self._loader, self._before_fetch, self._fetching = loader, None, False
        samplers, begun = self._states_of(loader), resumed.get("begun")
        if begun is not None:
            set_random_state(begun["random"])
            samplers.resume(begun["samplers"])
        self._begun = {
            "random": random_state(),
            "samplers": samplers.now(),
            "workers_persisted": resumed.get("workers_persisted", _persist(loader)),
        }
        self._examples = Examples(loader if _layout(loader) else None)
        recovered = _take_position(loader, self)
        self.fitted = self._fetched = resumed.get("batches", recovered)
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
        if isinstance(loader, Sequence):
            return itertools.islice(loader, self._fetched, None)
        if not _is_data_loader(loader):
            self._warn_if_it_restarts(loader)
            return iter(loader)
        if isinstance(loader.dataset, IterableDataset) and not workers.is_stateful(
            loader.dataset
        ):
            self._warn_if_it_restarts(loader.dataset)
        self._resume_workers(loader, resumed)
        if self._fetched or loader.num_workers:
            return self._twins_iterator(loader, resumed)
        # What a Checkpointer has recovered of it may be of another layout.
        speechbrain.clear_position(loader)
        return self._counted_iterator(loader) if varies(loader) else iter(loader)

    def _counted_iterator(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Iterates a copy of the loader that records how large its batches are."""
        counted = CountedBatches(loader.batch_sampler)
        iterator = iter(twin(loader, batch_sampler=counted))
        self._examples.count(counted, 0)
        speechbrain.track_iterator(loader, iterator, 0)
        return iterator

    def _warn_if_it_restarts(self, data: Any) -> None:
        if self._fetched:
            logger.warning(
                "%s has no position that can be restored: the resumed epoch begins with its "
                "first item, after %d batches. Give it state_dict() and load_state_dict(), "
                "or use a dataset with indices.",
                type(data).__name__,
                self._fetched,
            )
        self.fitted = self._fetched = 0

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
            self._workers = resumed["workers"]
            self._next_worker = resumed.get("next_worker", 0) if self._fetched else 0

    def _twins_iterator(self, loader: DataLoader[Any], resumed: State) -> Iterator[Any]:
        """Iterates a copy of the loader: the user's stays as it is."""
        new = None if resumed else _PERSISTENT.get(loader)
        if new is None:
            new = self._twin(loader, resumed)
        if loader.persistent_workers:
            _PERSISTENT[loader] = new
        iterator = iter(new)
        for sampler in (new.batch_sampler, new.sampler):
            if isinstance(sampler, workers.SkippingSampler):
                sampler.skip()
                self._count(sampler, loader, resumed)
        speechbrain.track_iterator(loader, iterator, self._fetched - self._next_worker)
        return iterator

    def _count(self, skipping: workers.SkippingSampler, loader: Any, resumed: State) -> None:
        """Counts the examples of batches whose sizes vary, from those that were skipped on."""
        if not isinstance(skipping.sampler, CountedBatches):
            return
        # Persistent workers do not skip in their second pass.
        skipped = skipping.skipped if resumed or self._fetched else 0
        examples = self._examples.count(skipping.sampler, skipped)
        known = self._fetched and resumed.get("examples") is not None
        now, is_over = layout(loader), resumed.get("over")
        if known and not is_over and (skipped != self._fetched or resumed["layout"] != now):
            warn(resumed, now, examples)
        self.fitted = self._fetched = skipped

    def _twin(self, loader: DataLoader[Any], resumed: State) -> DataLoader[Any]:
        changes: dict[str, Any] = {}
        if loader.num_workers:
            changes["collate_fn"] = partial(workers.collate_with_state, loader.collate_fn)
            changes["worker_init_fn"] = partial(
                workers.restore_worker, loader.worker_init_fn, self._workers
            )
        waiting, batched = self._next_worker, loader.batch_sampler is not None
        if waiting:
            changes["dataset"] = workers.PlaceholderDataset(loader.dataset, waiting)
        placeholder = [workers.PLACEHOLDER] if batched else workers.PLACEHOLDER
        before: list[Any] = [placeholder] * waiting
        name = "batch_sampler" if batched else "sampler"
        skip = 0 if isinstance(loader.dataset, IterableDataset) else self._fetched
        # Persistent workers begin a pass without the random number that new ones need.
        persisted = bool(resumed) and self._begun["workers_persisted"]
        random = self._begun["random"] if persisted else None
        sampler, examples = getattr(loader, name), None
        if varies(loader):
            sampler = CountedBatches(sampler)
            examples = resumed.get("skip_examples", resumed.get("examples"))
        changes[name] = workers.SkippingSampler(sampler, skip, before, random, examples)
        new = twin(loader, **changes)
        speechbrain.clear_position(new)
        return new


def recovered_batches(loader: Any) -> int:
    """The position of a loader that a Checkpointer has recovered, by itself.

    Args:
        loader: What ``fit`` was given.
    """
    if isinstance(loader, SaveableDataLoader):
        return loader.recovered
    return speechbrain.recovered_position(loader)


def _take_position(loader: Any, position: DataPosition) -> int:
    """The same, for the pass that begins."""
    recovered = recovered_batches(loader)
    if isinstance(loader, SaveableDataLoader):
        loader.position, loader.recovered = position, 0
    return recovered


def _is_data_loader(loader: Any) -> bool:
    """Whether an object is iterated as a DataLoader is, or as SpeechBrain's."""
    return isinstance(loader, DataLoader) and (
        type(loader).__iter__ is DataLoader.__iter__ or speechbrain.is_saveable_loader(loader)
    )


def _layout(loader: Any) -> State:
    """How the data are divided into batches, of loaders whose position is that of indices."""
    return layout(loader) if isinstance(loader, Sequence) or _is_data_loader(loader) else {}


def _persist(loader: Any) -> bool:
    """Whether the workers of a loader are running, and stay for its next pass."""
    return isinstance(loader, DataLoader) and loader in _PERSISTENT


def _state_of_stream(loader: Any) -> State:
    """The state of data without indices: of the loader itself, or of its dataset."""
    if workers.is_stateful(loader):
        return {"loader": loader.state_dict()}
    return {} if getattr(loader, "num_workers", 0) else workers.dataset_state(loader)
