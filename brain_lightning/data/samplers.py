"""Samplers whose order depends on nothing but their seed and the epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DistributedSampler, RandomSampler

# SpeechBrain's seed where $SB_GLOBAL_SEED is not set (Brain._train_loader_specifics).
DEFAULT_SEED = 563375142


class ReproducibleRandomSampler(RandomSampler):
    """A ``RandomSampler`` whose order depends on its seed and the epoch alone.

    Call ``set_epoch`` before every epoch, else each epoch has the same order
    (``speechbrain.dataio.sampler.ReproducibleRandomSampler``).

    Args:
        data_source: The dataset whose indices to shuffle.
        seed: Added to the epoch to seed each pass.
        epoch: The epoch to start at.
        **kwargs: ``replacement`` and ``num_samples`` of ``RandomSampler``.

    Raises:
        ValueError: A ``generator`` was given; the sampler has its own.
    """

    def __init__(
        self, data_source: Sized, seed: int = DEFAULT_SEED, epoch: int = 0, **kwargs: Any
    ) -> None:
        if "generator" in kwargs:
            raise ValueError(
                "ReproducibleRandomSampler has a generator of its own: give seed= instead"
            )
        super().__init__(data_source, **kwargs)
        self.seed = int(seed)
        self.epoch = epoch
        self.generator = torch.Generator()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the next pass is shuffled for.

        Args:
            epoch: The epoch's number.
        """
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class DistributedSamplerWrapper(DistributedSampler[Any]):
    """Gives each process its shard of what any sampler or batch sampler yields.

    (``speechbrain.dataio.sampler.DistributedSamplerWrapper``.)

    Args:
        sampler: Has a length, and yields the same in every process.
        **kwargs: Of ``DistributedSampler``.
    """

    def __init__(self, sampler: Any, **kwargs: Any) -> None:
        # DistributedSampler asks its dataset for nothing but a length.
        super().__init__(dataset=sampler, **kwargs)
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        items = list(self.sampler)
        return iter([items[index] for index in super().__iter__()])

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the next pass is shuffled for, also in the inner sampler.

        Args:
            epoch: The epoch's number.
        """
        super().set_epoch(epoch)
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def unwrapped(sampler: Any) -> Any:
    """The sampler in a ``DistributedSamplerWrapper``, SpeechBrain's or ours; else itself.

    Args:
        sampler: Any sampler, of examples or of batches.
    """
    wraps = isinstance(sampler, DistributedSampler) and hasattr(sampler, "sampler")
    return sampler.sampler if wraps else sampler


def share_anew(sampler: DistributedSampler[Any]) -> None:
    """Shares what a sampler wraps, whose length has changed, which is looked at once.

    Args:
        sampler: A DistributedSampler, or a wrapper such as SpeechBrain's.
    """
    anew: DistributedSampler[Any] = DistributedSampler(
        sampler.dataset, sampler.num_replicas, sampler.rank, drop_last=sampler.drop_last
    )
    sampler.num_samples, sampler.total_size = anew.num_samples, anew.total_size
