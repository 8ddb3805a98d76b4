"""The peak memory includes memory that was freed before the end."""

from __future__ import annotations

import os

import pytest
import torch

from brain_lightning.trials.memory import capacity, current_memory, measured_usage

MEGABYTE = 1 << 20


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset here"
)
def test_each_measurement_has_a_separate_peak() -> None:
    peaks = []
    for megabytes in (0, 200, 100, 0):
        with measured_usage("cpu") as usage:
            # Written to, because untouched pages use no memory. Freed before the end.
            torch.ones(megabytes * MEGABYTE // 4).sum()
        peaks.append(usage.peak)
        assert usage.seconds > 0
    before, *grown, after = peaks
    for peak, megabytes in zip(grown, (200, 100), strict=True):
        assert abs(peak - before - megabytes * MEGABYTE) < 20 * MEGABYTE
    assert abs(after - before) < 20 * MEGABYTE
    taken = torch.ones(200 * MEGABYTE // 4)
    assert abs(current_memory("cpu") - after - 200 * MEGABYTE) < 20 * MEGABYTE
    del taken
    assert capacity("cpu") is None


def test_the_peak_is_known_after_an_error() -> None:
    with pytest.raises(MemoryError), measured_usage("cpu") as usage:
        raise MemoryError
    assert usage.peak > 0


@pytest.mark.gpu
def test_the_peak_on_a_gpu_is_the_memory_of_tensors() -> None:
    with measured_usage("cuda") as usage:
        torch.ones(100 * MEGABYTE // 4, device="cuda").sum()
    assert abs(usage.peak - 100 * MEGABYTE) < MEGABYTE
    found = capacity("cuda")
    assert found is not None
    assert found > 1 << 30
