"""DataLoaders as a Brain makes them: reproducible shuffling, padding, saveable positions."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from brain_lightning.checkpoints import hooks
from brain_lightning.compat import speechbrain
from brain_lightning.errors import UnsupportedError

from .samplers import DEFAULT_SEED, DistributedSamplerWrapper, ReproducibleRandomSampler


class _Position(Protocol):
    fitted: int


@hooks.register_checkpoint_hooks
class SaveableDataLoader(DataLoader[Any]):
    """A DataLoader whose position in the data is saved, as SpeechBrain's of the same name.

    The file is SpeechBrain's: the number of batches, after which ``fit`` resumes.

    Attributes:
        position: Of the run that iterates the loader; it counts the fitted batches.
        recovered: The number of batches that the next pass skips.
    """

    position: _Position | None = None
    recovered = 0

    @hooks.mark_as_saver
    def _save(self, path: str | PathLike[str]) -> None:
        batches = None if self.position is None else self.position.fitted
        Path(path).write_text(str(batches), encoding="utf-8")

    @hooks.mark_as_loader
    def _recover(self, path: str | PathLike[str], end_of_epoch: bool) -> None:
        saved = Path(path).read_text(encoding="utf-8")
        # One that was iterated recovers the best checkpoint for an evaluation.
        if not (end_of_epoch or self.position or saved == str(None)):
            self.recovered = int(saved)


def twin(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """A copy of a loader, to be iterated instead: the user's stays as it is.

    Args:
        loader: The loader.
        **changes: Attributes that differ in the copy.
    """
    new = copy.copy(loader)
    # DataLoader's __setattr__ refuses to change some of these.
    vars(new).update(changes, _iterator=None)
    return new


def has_indices(loader: object) -> bool:
    """Whether a loader draws indices, which say where it is in its data, as a stream has none.

    Args:
        loader: Any iterable.
    """
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def is_sharded(loader: Any) -> bool:
    """Whether a loader gives each process its own share, as far as it can be seen.

    Args:
        loader: A DataLoader.
    """
    batches = loader.batch_sampler
    samplers = (loader.sampler, batches, getattr(batches, "sampler", None))
    if has_indices(loader):
        # One of somebody else's may have these names too.
        return any(hasattr(sampler, "num_replicas") for sampler in samplers)
    # The stages of a WebDataset.
    stages = getattr(loader.dataset, "pipeline", ())
    return any("split_by_node" in repr(stage) for stage in stages)


def is_loader(data: object) -> bool:
    """Whether ``fit`` iterates ``data`` directly, rather than making a loader for it."""
    return isinstance(data, DataLoader) or speechbrain.is_looped_loader(data)


def shuffling_sampler(dataset: Any, loader_kwargs: Mapping[str, Any]) -> Any:
    """The sampler that ``shuffle=True`` stands for.

    Its seed is ``$SB_GLOBAL_SEED`` where that is set
    (``speechbrain.Brain._train_loader_specifics``).

    Args:
        dataset: The dataset to shuffle.
        loader_kwargs: Arguments of the loader.

    Returns:
        The sampler.

    Raises:
        ValueError: There is a sampler already.
    """
    if loader_kwargs.get("sampler") is not None:
        raise ValueError("Cannot specify both shuffle=True and a sampler in loader_kwargs")
    seed = int(os.environ.get("SB_GLOBAL_SEED", DEFAULT_SEED))
    return ReproducibleRandomSampler(dataset, seed=seed)


def distributed_sampler(
    dataset: Any, loader_kwargs: Mapping[str, Any], shuffle: bool, **shard: int
) -> dict[str, Any]:
    """The sampler that gives each process its shard of the training set.

    (``speechbrain.Brain._train_loader_specifics``.)

    Args:
        dataset: The dataset to shard.
        loader_kwargs: Arguments of the loader.
        shuffle: Whether examples, or batches of a batch sampler, are shuffled.
        **shard: ``rank`` and ``num_replicas``.

    Returns:
        ``sampler`` or ``batch_sampler``; nothing for a stream, of which ``fit`` warns.
    """
    if isinstance(dataset, IterableDataset):
        return {}
    options: dict[str, Any] = {"drop_last": loader_kwargs.get("drop_last", False), **shard}
    sampler, batches = loader_kwargs.get("sampler"), loader_kwargs.get("batch_sampler")
    if sampler is not None:
        options["shuffle"] = loader_kwargs.get("shuffle", False)
        return {"sampler": DistributedSamplerWrapper(sampler, **options)}
    if batches is not None:
        return {"batch_sampler": DistributedSamplerWrapper(batches, shuffle=shuffle, **shard)}
    return {"sampler": DistributedSampler(dataset, shuffle=shuffle, **options)}


def make_dataloader(dataset: Any, checkpointer: Any = None, **loader_kwargs: Any) -> Any:
    """Makes a loader, by SpeechBrain's own function where its objects are used.

    Args:
        dataset: A dataset; a SpeechBrain ``DynamicItemDataset`` is padded.
        checkpointer: Where there is one, the position of the loader can be saved.
        **loader_kwargs: Arguments of ``DataLoader``, and SpeechBrain's
            ``looped_nominal_epoch``.

    Returns:
        The loader.

    Raises:
        UnsupportedError: ``looped_nominal_epoch`` without SpeechBrain.
    """
    looped = loader_kwargs.get("looped_nominal_epoch") is not None
    maker = speechbrain.dataloader_maker(dataset, checkpointer, looped)
    if maker is not None:
        return maker(dataset, **loader_kwargs)
    if looped:
        raise UnsupportedError(
            "looped_nominal_epoch makes SpeechBrain's LoopedLoader: build that loader "
            "with speechbrain.dataio.dataloader.make_dataloader and give it to fit()"
        )
    loader_kwargs.pop("looped_nominal_epoch", None)
    if loader_kwargs.get("shuffle"):
        loader_kwargs["sampler"] = shuffling_sampler(dataset, loader_kwargs)
        del loader_kwargs["shuffle"]
    if checkpointer is None or isinstance(dataset, IterableDataset):
        return DataLoader(dataset, **loader_kwargs)
    return SaveableDataLoader(dataset, **loader_kwargs)


def is_saveable(loader: object) -> bool:
    """Whether a Checkpointer can save a loader's position in the data.

    Args:
        loader: Any loader.
    """
    return isinstance(loader, SaveableDataLoader) or speechbrain.is_saveable_loader(loader)


def length_of(loader: Any) -> int | None:
    """The length of a loader, now, or None where it has none.

    Args:
        loader: Any iterable.
    """
    try:
        return len(loader)
    except (TypeError, NotImplementedError, AttributeError):
        return None
