"""The position in the data of one loader, and how a pass over the data resumes there."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch.utils.data import DataLoader

from brain_lightning.compat import speechbrain
from brain_lightning.data.dataloaders import SaveableDataLoader, has_indices, twin
from brain_lightning.data.examples import CountedBatches, Examples, adapt, layout, varies, warn
from brain_lightning.data.several_loaders import SeveralLoaders

from . import worker_states as workers
from .plain_values import State
from .position import LoopedPosition, Position, SeveralPositions
from .random_state import random_state, set_random_state
from .sampler_states import SamplerStates, plain_states

logger = logging.getLogger(__name__)


# For each loader with persistent workers, the copy of the loader that owns these workers.
_PERSISTENT: WeakKeyDictionary[DataLoader[Any], DataLoader[Any]] = WeakKeyDictionary()


class DataPosition(Position):
    """The position in the data of one loader.

    To resume a pass, the random state from the start of the pass is restored and the sampler
    yields the same indices again, without loading any data. Then the saved state is restored.
    """

    def __init__(self) -> None:
        super().__init__()
        self._loader: Any = None
        self._examples = Examples(None)
        self._begun: State = {"samplers": []}
        self._samplers = SamplerStates(None)
        # States by worker id. The dict is replaced and never changed in place.
        self._workers: dict[int, State] = {}
        self._next_worker = 0
        # Id of the worker that sent the last batch, and the worker states before that batch.
        self._before = (0, self._workers)

    # ------------------------------------------------------------------ saving

    def state(self, fitted: int, after_fetch: State | None) -> State:
        """See ``Position``."""
        ahead = self._fetched > fitted
        begun = ahead or self._fetching
        stored = self._before_fetch if begun else None
        next_worker, states = self._next_worker, self._workers
        if ahead and states:
            next_worker, states = self._before
        return {
            "batches": fitted,
            **self._examples.state(fitted, ahead),
            "begun": {**self._begun, "samplers": plain_states(self._begun["samplers"])},
            "draw": self._now() if stored is None else stored,
            "drawn": after_fetch if ahead else None,
            "over": self._over and not ahead,
            "workers_persisted": self._begun.get("workers_persisted", False),
            "workers": states,
            "next_worker": next_worker,
            "num_workers": getattr(self._loader, "num_workers", 0),
        }

    def state_between_passes(self) -> State:
        """See ``Position``."""
        if self._resumed is not None and "begun" not in self._resumed:
            # The restored state has not taken effect.
            return self._resumed
        persistent = getattr(self._loader, "persistent_workers", False)
        return {
            "samplers": plain_states(self._samplers.now()),
            "workers": self._workers if persistent else {},
            "workers_persisted": _has_workers(self._loader),
            "num_workers": getattr(self._loader, "num_workers", 0),
            "layout": _layout(self._loader),
        }

    def resume(self, state: State, loader: Any) -> None:
        """See ``Position``."""
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

    def mark(self, records: bool) -> DataPosition:
        """See ``Position``."""
        marked = copy.copy(self)
        marked._examples, marked._fetching = copy.copy(self._examples), True
        runs = self.passes and not self._over
        marked._before_fetch = _state_of_stream(self._loader) if records and runs else None
        return marked

    # --------------------------------------------------------------- iterating

    def _record(self) -> None:
        if self.passes:
            # A sampler draws random numbers at its first index, and the other loaders have
            # fetched since the pass began.
            if "first" not in self._begun:
                self._begun["first"] = random_state()
        elif self.records_fetches:
            self._before_fetch = self._now()

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
        samplers, begun, random = self._states_of(loader), resumed.get("begun"), None
        if resumed.get("over") and begun is None:
            # The pass of this part was over. The state is for its next pass.
            self._resumed = resumed
            return iter(())
        if "draw" in resumed:
            random = resumed["draw"].get("random") or random_state()
        if begun is not None:
            set_random_state(begun["random"])
            samplers.resume(begun["samplers"])
        self._begun = {
            **({"first": begun["first"]} if begun and "first" in begun else {}),
            "random": random_state(),
            "samplers": samplers.now(),
            "workers_persisted": resumed.get("workers_persisted", _has_workers(loader)),
        }
        self._examples = Examples(loader if _layout(loader) else None)
        recovered = _take_position(loader, self)
        self.fitted = self._fetched = resumed.get("batches", recovered)
        iterator = self._iterator(loader, resumed)
        if random is not None:
            set_random_state(random)
        return iterator

    def _iterator(self, loader: Any, resumed: State) -> Iterator[Any]:
        before_fetch = resumed.get("draw", {})
        if "loader" in before_fetch:
            loader.load_state_dict(before_fetch["loader"])
            return iter(loader)
        if "dataset" in before_fetch:
            loader.dataset.load_state_dict(before_fetch["dataset"])
        if isinstance(loader, Sequence):
            return itertools.islice(loader, self._fetched, None)
        if not _is_data_loader(loader):
            if has_indices(loader):
                return self._reload_to_position(loader)
            self._warn_if_it_restarts(loader)
            return iter(loader)
        if not has_indices(loader) and not workers.is_stateful(loader.dataset):
            self._warn_if_it_restarts(loader.dataset)
        self._resume_workers(loader, resumed)
        if self._fetched or loader.num_workers:
            return self._iterate_twin(loader, resumed)
        # The position that a Checkpointer has recovered may belong to another batch layout.
        speechbrain.clear_position(loader)
        return self._counted_iterator(loader) if varies(loader) else iter(loader)

    def _reload_to_position(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Iterates a loader with a custom ``__iter__``, and loads skipped batches again."""
        iterator = iter(loader)
        if "first" in self._begun:
            set_random_state(self._begun["first"])
        next(itertools.islice(iterator, self._fetched, self._fetched), None)
        return iterator

    def _counted_iterator(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Iterates a copy of the loader that records the sizes of its batches."""
        counted = CountedBatches(loader.batch_sampler)
        iterator = iter(twin(loader, batch_sampler=counted))
        self._examples.count(counted, 0)
        speechbrain.track_iterator(loader, iterator, 0)
        return iterator

    def _warn_if_it_restarts(self, data: Any) -> None:
        if self._fetched:
            logger.warning(
                "%s has no position that can be restored. The resumed epoch starts from its "
                "first item, and not after batch %d. Define state_dict() and "
                "load_state_dict(), or use a dataset with indices.",
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
                "The checkpoint was saved with num_workers=%d, but num_workers is %d now. "
                "Random numbers that the workers draw will differ.",
                resumed["num_workers"],
                loader.num_workers,
            )
        elif resumed:
            self._workers = resumed["workers"]
            self._next_worker = resumed.get("next_worker", 0) if self._fetched else 0

    def _iterate_twin(self, loader: DataLoader[Any], resumed: State) -> Iterator[Any]:
        """Iterates a copy of the loader, so that the user's loader does not change."""
        new = None if resumed else _PERSISTENT.get(loader)
        if new is None:
            new = self._twin(loader, resumed)
        if loader.persistent_workers:
            _PERSISTENT[loader] = new
        iterator = iter(new)
        if "first" in self._begun and not loader.num_workers:
            set_random_state(self._begun["first"])
        for sampler in (new.batch_sampler, new.sampler):
            if isinstance(sampler, workers.SkippingSampler):
                sampler.skip()
                self._count(sampler, loader, resumed)
        speechbrain.track_iterator(loader, iterator, self._fetched - self._next_worker)
        return iterator

    def _count(self, skipping: workers.SkippingSampler, loader: Any, resumed: State) -> None:
        """Counts examples if the sizes of batches vary, starting after the skipped ones."""
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
        skip = self._fetched if has_indices(loader) else 0
        # A pass with persistent workers does not draw the random seed for new workers.
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


def position_in(loader: Any, last: Position | None = None) -> Position:
    """Returns the position in the data of a loader of any class.

    Args:
        loader: Loader that ``fit`` got.
        last: Position in the data of the previous pass.

    Returns:
        ``last`` if its class fits the loader, else a new position.
    """
    position: Position
    if isinstance(loader, SeveralLoaders):
        position = SeveralPositions(position_in)
    elif speechbrain.is_looped_loader(loader):
        position = LoopedPosition(position_in)
    else:
        position = DataPosition()
    if last is not None:
        if type(last) is type(position):
            return last
        position.records_fetches = last.records_fetches
    return position


def recovered_batches(loader: Any) -> int:
    """Returns the number of batches in a position that a Checkpointer has recovered.

    This is the position of a loader that is itself a recoverable.

    Args:
        loader: Loader that ``fit`` got.
    """
    if isinstance(loader, SeveralLoaders):
        return max(map(recovered_batches, loader.loaders))
    if isinstance(loader, SaveableDataLoader):
        return loader.recovered
    return speechbrain.recovered_position(loader)


def _take_position(loader: Any, position: DataPosition) -> int:
    """Returns the result of ``recovered_batches``, and resets it for the next pass."""
    recovered = recovered_batches(loader)
    if isinstance(loader, SaveableDataLoader):
        loader.position, loader.recovered = position, 0
    return recovered


def _is_data_loader(loader: Any) -> bool:
    """Whether a loader uses ``DataLoader.__iter__``, or SpeechBrain's override of it."""
    return isinstance(loader, DataLoader) and (
        type(loader).__iter__ is DataLoader.__iter__ or speechbrain.is_saveable_loader(loader)
    )


def _layout(loader: Any) -> State:
    """Returns how the data are divided into batches; empty for loaders without indices."""
    return layout(loader) if isinstance(loader, Sequence) or _is_data_loader(loader) else {}


def _has_workers(loader: Any) -> bool:
    """Whether the loader has persistent workers that are running."""
    return isinstance(loader, DataLoader) and loader in _PERSISTENT


def _state_of_stream(loader: Any) -> State:
    """Returns the state of data without indices: of the loader, or of its dataset."""
    if workers.is_stateful(loader):
        return {"loader": loader.state_dict()}
    return {} if getattr(loader, "num_workers", 0) else workers.dataset_state(loader)
