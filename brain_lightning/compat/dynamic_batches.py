"""The internals of SpeechBrain's DynamicBatchSampler: its batches, and how to resize them."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import numpy as np


def is_dynamic(sampler: object) -> bool:
    """Returns whether a sampler is SpeechBrain's DynamicBatchSampler.

    Args:
        sampler: Any batch sampler.
    """
    return hasattr(sampler, "_max_batch_length") and hasattr(sampler, "_bucket_boundaries")


def max_batch_length(sampler: Any) -> float:
    """Returns the maximum total length of a batch, including padding.

    Args:
        sampler: A DynamicBatchSampler.
    """
    return float(sampler._max_batch_length)


def total_length(sampler: Any) -> float:
    """Returns the total length of a batch of all examples, including padding.

    Args:
        sampler: A DynamicBatchSampler.
    """
    lengths = sampler._ex_lengths.values()
    return float(max(lengths) * len(lengths))


def set_max_batch_length(sampler: Any, length: float) -> None:
    """Generates the batches that the constructor would generate with another length.

    Args:
        sampler: A DynamicBatchSampler. If it computed its bucket boundaries itself, they are
            recomputed, because they are quantiles that depend on the length.
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
    """Returns the length of each example, by index.

    Args:
        sampler: A DynamicBatchSampler.
    """
    return {int(index): float(each) for index, each in sampler._ex_lengths.items()}


def fixed_batches(sampler: Any) -> list[list[int]] | None:
    """Returns the batches if they are the same in each epoch.

    Args:
        sampler: A DynamicBatchSampler.

    Returns:
        The batches, or None if each epoch combines other examples.
    """
    return None if sampler._shuffle_ex else [list(batch) for batch in sampler._batches]


def buckets(sampler: Any) -> list[tuple[list[int], int]]:
    """Returns the examples that may share a batch, and the maximum number of them.

    Args:
        sampler: A DynamicBatchSampler.
    """
    found: list[list[int]] = [[] for _ in sampler._bucket_lens]
    boundaries = sampler._bucket_boundaries.tolist()
    for index, length in lengths(sampler).items():
        # As numpy.searchsorted in _generate_batches.
        found[bisect_left(boundaries, length)].append(index)
    most = [int(min(each, sampler._max_batch_ex)) for each in sampler._bucket_lens]
    return list(zip(found, most, strict=True))
