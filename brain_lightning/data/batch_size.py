"""Reads and changes the batch size of a loader."""

from __future__ import annotations

from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from brain_lightning.compat import dynamic_batches as dynamic
from brain_lightning.errors import UnsupportedError

from .dataloaders import has_indices, length_of
from .samplers import unwrapped, update_shards


class BatchSize:
    """The batch size of one loader.

    Args:
        loader: DataLoader with a ``batch_size`` or with SpeechBrain's DynamicBatchSampler.

    Attributes:
        name: Name of the argument that sets the batch size in a recipe.

    Raises:
        UnsupportedError: The batch size cannot be changed.
    """

    def __init__(self, loader: Any) -> None:
        batches = getattr(loader, "batch_sampler", None)
        sampler = unwrapped(batches)
        self._loader: DataLoader[Any] = loader
        self._dynamic: Any = sampler if dynamic.is_dynamic(sampler) else None
        is_dynamic = self._dynamic is not None
        self.name = "max_batch_length" if is_dynamic else "batch_size"
        if not is_dynamic and (not has_indices(loader) or type(batches) is not BatchSampler):
            raise UnsupportedError(
                f"the batch size of {_describe(loader)} cannot be changed. Pass fit a dataset "
                "with batch_size in its loader_kwargs, or use SpeechBrain's "
                "DynamicBatchSampler."
            )

    @property
    def current(self) -> float:
        """The current size: number of examples, or total length of a dynamic batch."""
        if self._dynamic is not None:
            return dynamic.max_batch_length(self._dynamic)
        return self._loader.batch_size or 1

    @property
    def largest(self) -> float:
        """The size at which one batch has all the data of this process."""
        if self._dynamic is not None:
            return dynamic.total_length(self._dynamic)
        return length_of(self._loader.sampler) or 1

    def set(self, size: float) -> None:
        """Changes the size for every pass that starts later.

        Args:
            size: The new size, in the unit of ``current``.
        """
        batches: Any = self._loader.batch_sampler
        if self._dynamic is not None:
            dynamic.set_max_batch_length(self._dynamic, size)
            if isinstance(batches, DistributedSampler):
                update_shards(batches)
            return
        # DataLoader's __setattr__ does not allow changing its batch_size.
        batches.batch_size = vars(self._loader)["batch_size"] = int(size)


def _describe(loader: Any) -> str:
    batches = getattr(loader, "batch_sampler", None)
    name = type(loader).__name__
    return f"a {name}" if batches is None else f"a {name} with a {type(batches).__name__}"
