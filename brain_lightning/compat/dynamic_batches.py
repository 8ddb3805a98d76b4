"""SpeechBrain's DynamicBatchSampler: what its batches may be, and batches of another size."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import numpy as np


def is_dynamic(sampler: object) -> bool:
    """Whether a sampler is SpeechBrain's DynamicBatchSampler.

    Args:
        sampler: Any sampler of batches.
    """
    return hasattr(sampler, "_max_batch_length") and hasattr(sampler, "_bucket_boundaries")


def max_batch_length(sampler: Any) -> float:
    """The most that the examples of a batch are long together, with padding.

    Args:
        sampler: One that ``is_dynamic``.
    """
    return float(sampler._max_batch_length)


def total_length(sampler: Any) -> float:
    """The length of one batch of all examples, with padding.

    Args:
        sampler: One that ``is_dynamic``.
    """
    lengths = sampler._ex_lengths.values()
    return float(max(lengths) * len(lengths))


def set_max_batch_length(sampler: Any, length: float) -> None:
    """Makes the batches that the constructor would make with another length.

    Args:
        sampler: One that ``is_dynamic``; boundaries of buckets that were not given to it are
            quantiles of the length.
        length: The new ``max_batch_length``.
    """
    boundaries, before = sampler._bucket_boundaries, sampler._max_batch_length
    if np.array_equal(boundaries, _quantiles(sampler, before)):
        boundaries = sampler._bucket_boundaries = _quantiles(sampler, length)
    fits = (max(1, int(length / boundary)) for boundary in boundaries)
    sampler._max_batch_length = length
    sampler._bucket_lens = [*(min(sampler._max_batch_ex, each) for each in fits), 1]
    sampler._generate_batches()


def _quantiles(sampler: Any, length: float) -> Any:
    number = len(sampler._bucket_boundaries)
    return np.array(sampler._get_boundaries_through_warping(length, number))


def lengths(sampler: Any) -> dict[int, float]:
    """How long each example is, by index.

    Args:
        sampler: One that ``is_dynamic``.
    """
    return {int(index): float(each) for index, each in sampler._ex_lengths.items()}


def fixed_batches(sampler: Any) -> list[list[int]] | None:
    """The batches, where they are the same ones in each epoch.

    Args:
        sampler: One that ``is_dynamic``.

    Returns:
        None where other examples meet in each epoch.
    """
    return None if sampler._shuffle_ex else [list(batch) for batch in sampler._batches]


def buckets(sampler: Any) -> list[tuple[list[int], int]]:
    """The examples that may meet in a batch, and how many of them at most.

    Args:
        sampler: One that ``is_dynamic``.
    """
    found: list[list[int]] = [[] for _ in sampler._bucket_lens]
    boundaries = sampler._bucket_boundaries.tolist()
    for index, length in lengths(sampler).items():
        # As its _generate_batches does, by numpy.searchsorted.
        found[bisect_left(boundaries, length)].append(index)
    most = [int(min(each, sampler._max_batch_ex)) for each in sampler._bucket_lens]
    return list(zip(found, most, strict=True))
