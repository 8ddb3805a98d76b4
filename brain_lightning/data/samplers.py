"""Samplers whose order depends only on their seed and the epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DistributedSampler, RandomSampler

# SpeechBrain's seed if $SB_GLOBAL_SEED is not set (Brain._train_loader_specifics).
DEFAULT_SEED = 563375142


class ReproducibleRandomSampler(RandomSampler):
    """A ``RandomSampler`` whose order depends only on its seed and the epoch.

    Call ``set_epoch`` before every epoch. Otherwise each epoch has the same order
    (``speechbrain.dataio.sampler.ReproducibleRandomSampler``).

    Args:
        data_source: Dataset whose indices are shuffled.
        seed: Seed. The epoch is added to it for each pass.
        epoch: First epoch.
        **kwargs: ``replacement`` and ``num_samples`` of ``RandomSampler``.

    Raises:
        ValueError: A ``generator`` was given. The sampler creates its own.
    """

    def __init__(
        self, data_source: Sized, seed: int = DEFAULT_SEED, epoch: int = 0, **kwargs: Any
    ) -> None:
        if "generator" in kwargs:
            raise ValueError(
                "ReproducibleRandomSampler creates its own generator. Use seed= instead of "
                "generator=."
            )
        super().__init__(data_source, **kwargs)
        self.seed = int(seed)
        self.epoch = epoch
        self.generator = torch.Generator()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next pass.

        Args:
            epoch: Number of the epoch.
        """
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class DistributedSamplerWrapper(DistributedSampler[Any]):
    """Gives each process its shard of the items that a sampler or a batch sampler yields.

    (``speechbrain.dataio.sampler.DistributedSamplerWrapper``.)

    Args:
        sampler: Sampler with a length that yields the same items in every process.
        **kwargs: Arguments of ``DistributedSampler``.
    """

    def __init__(self, sampler: Any, **kwargs: Any) -> None:
        # DistributedSampler uses only the length of its dataset.
        super().__init__(dataset=sampler, **kwargs)
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        items = list(self.sampler)
        return iter([items[index] for index in super().__iter__()])

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next pass, also in the wrapped sampler.

        Args:
            epoch: Number of the epoch.
        """
        super().set_epoch(epoch)
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def unwrapped(sampler: Any) -> Any:
    """Returns the sampler in a ``DistributedSamplerWrapper`` (also SpeechBrain's), or itself.

    Args:
        sampler: Any sampler of examples or batches.
    """
    wraps = isinstance(sampler, DistributedSampler) and hasattr(sampler, "sampler")
    return sampler.sampler if wraps else sampler


def update_shards(sampler: DistributedSampler[Any]) -> None:
    """Updates the shard sizes of a distributed sampler after its wrapped sampler changed.

    DistributedSampler computes them only once, when it is created.

    Args:
        sampler: A DistributedSampler or a wrapper such as SpeechBrain's.
    """
    anew: DistributedSampler[Any] = DistributedSampler(
        sampler.dataset, sampler.num_replicas, sampler.rank, drop_last=sampler.drop_last
    )
    sampler.num_samples, sampler.total_size = anew.num_samples, anew.total_size
