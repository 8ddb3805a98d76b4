"""SpeechBrain's DynamicBatchSampler, with batches of another size."""

from __future__ import annotations

import math
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
    if math.isclose(boundaries[-1], before):
        boundaries = boundaries * (length / before)
    fits = (max(1, int(length / boundary)) for boundary in boundaries)
    sampler._max_batch_length = length
    sampler._bucket_boundaries = np.asarray(boundaries)
    sampler._bucket_lens = [*(min(sampler._max_batch_ex, each) for each in fits), 1]
    sampler._generate_batches()
