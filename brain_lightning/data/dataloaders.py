"""Creates DataLoaders as a Brain does: reproducible shuffling, padding, saved positions."""

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
    """A DataLoader whose position is saved, like SpeechBrain's class of the same name.

    The file has SpeechBrain's format: the number of batches after which ``fit`` resumes.

    Attributes:
        position: Position of the run that iterates the loader, which counts fitted batches.
        recovered: Number of batches that the next pass skips.
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
        # After training, a loader recovers along with the best checkpoint, for evaluation.
        if not (end_of_epoch or self.position or saved == str(None)):
            self.recovered = int(saved)


def twin(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """Copies a loader, to iterate the copy and leave the user's loader unchanged.

    Args:
        loader: The loader.
        **changes: Attributes that differ in the copy.
    """
    new = copy.copy(loader)
    # DataLoader's __setattr__ does not allow changing some of these.
    vars(new).update(changes, _iterator=None)
    return new


def has_indices(loader: object) -> bool:
    """Returns whether a loader samples indices, which define a position. A stream has none.

    Args:
        loader: Any iterable.
    """
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def is_sharded(loader: Any) -> bool:
    """Returns whether a loader gives each process its own shard, as far as can be detected.

    Args:
        loader: A DataLoader.
    """
    batches = loader.batch_sampler
    samplers = (loader.sampler, batches, getattr(batches, "sampler", None))
    if has_indices(loader):
        # Duck typing, because a custom distributed sampler may have these names, too.
        return any(hasattr(sampler, "num_replicas") for sampler in samplers)
    # The pipeline stages of a WebDataset.
    stages = getattr(loader.dataset, "pipeline", ())
    return any("split_by_node" in repr(stage) for stage in stages)


def is_loader(data: object) -> bool:
    """Returns whether ``fit`` iterates ``data`` directly instead of creating a loader."""
    return isinstance(data, DataLoader) or speechbrain.is_looped_loader(data)


def shuffling_sampler(dataset: Any, loader_kwargs: Mapping[str, Any]) -> Any:
    """Returns the sampler that implements ``shuffle=True``.

    Its seed is ``$SB_GLOBAL_SEED`` if this variable is set
    (``speechbrain.Brain._train_loader_specifics``).

    Args:
        dataset: Dataset to shuffle.
        loader_kwargs: Arguments of the loader.

    Returns:
        The sampler.

    Raises:
        ValueError: ``loader_kwargs`` already has a sampler.
    """
    if loader_kwargs.get("sampler") is not None:
        raise ValueError("Cannot specify both shuffle=True and a sampler in loader_kwargs")
    seed = int(os.environ.get("SB_GLOBAL_SEED", DEFAULT_SEED))
    return ReproducibleRandomSampler(dataset, seed=seed)


def distributed_sampler(
    dataset: Any, loader_kwargs: Mapping[str, Any], shuffle: bool, **shard: int
) -> dict[str, Any]:
    """Returns the sampler that gives each process its shard of the training set.

    (``speechbrain.Brain._train_loader_specifics``.)

    Args:
        dataset: Dataset to shard.
        loader_kwargs: Arguments of the loader.
        shuffle: Whether examples, or batches of a batch sampler, are shuffled.
        **shard: ``rank`` and ``num_replicas``.

    Returns:
        Arguments of the loader: ``sampler`` or ``batch_sampler``. Empty for a stream. In that
        case ``fit`` logs a warning.
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
    """Creates a loader, with SpeechBrain's own function if SpeechBrain's objects need it.

    Args:
        dataset: A dataset. Examples of a SpeechBrain ``DynamicItemDataset`` are padded.
        checkpointer: Checkpointer of the Brain. With one, the loader's position is saved.
        **loader_kwargs: Arguments of ``DataLoader``, and SpeechBrain's
            ``looped_nominal_epoch``.

    Returns:
        The loader.

    Raises:
        UnsupportedError: ``looped_nominal_epoch`` is given and SpeechBrain is not loaded.
    """
    looped = loader_kwargs.get("looped_nominal_epoch") is not None
    maker = speechbrain.dataloader_maker(dataset, checkpointer, looped)
    if maker is not None:
        return maker(dataset, **loader_kwargs)
    if looped:
        raise UnsupportedError(
            "looped_nominal_epoch needs SpeechBrain's LoopedLoader. Create that loader with "
            "speechbrain.dataio.dataloader.make_dataloader and pass it to fit()."
        )
    loader_kwargs.pop("looped_nominal_epoch", None)
    if loader_kwargs.get("shuffle"):
        loader_kwargs["sampler"] = shuffling_sampler(dataset, loader_kwargs)
        del loader_kwargs["shuffle"]
    if checkpointer is None or isinstance(dataset, IterableDataset):
        return DataLoader(dataset, **loader_kwargs)
    return SaveableDataLoader(dataset, **loader_kwargs)


def is_saveable(loader: object) -> bool:
    """Returns whether a Checkpointer can save a loader's position.

    Args:
        loader: Any loader.
    """
    return isinstance(loader, SaveableDataLoader) or speechbrain.is_saveable_loader(loader)


def length_of(loader: Any) -> int | None:
    """Returns the current length of a loader, or None if it has no length.

    Args:
        loader: Any iterable.
    """
    try:
        return len(loader)
    except (TypeError, NotImplementedError, AttributeError):
        return None
