"""Errors if ranks cannot skip a batch together. tests/system/distributed has the rest."""

from __future__ import annotations

from typing import Any

import pytest
import speechbrain
import torch
from torch import nn

from brain_lightning import UnsupportedError
from brain_lightning.compat.speechbrain import calls_ours
from brain_lightning.distributed.batch_flags import BatchFlags
from brain_lightning.step.synchronized import synchronize_oom
from brain_lightning.temporary import TemporaryAttributes
from tests.support.brains import Manual, Regression, make


class Around(Regression):
    def fit_batch(self, batch: Any) -> Any:
        return super().fit_batch(batch)


class WrapsItself(Regression):
    def _wrap_distributed(self) -> None:
        pass


def test_the_ranks_skip_batches_together_until_the_run_ends() -> None:
    for cls in (Regression, Around):
        brain = make(cls)
        with TemporaryAttributes() as temporary:
            synchronize_oom(brain, temporary)
            assert brain._lightning.synchronizes_oom
        assert not brain._lightning.synchronizes_oom


@pytest.mark.parametrize(
    ("cls", "part", "sharding", "reason"),
    [
        (Manual, None, None, "Manual.fit_batch runs its own backward pass"),
        (WrapsItself, None, None, "WrapsItself overrides _wrap_distributed"),
        (Regression, nn.SyncBatchNorm(2), None, "'part' has a SyncBatchNorm"),
        (Regression, nn.Embedding(2, 2, sparse=True), None, "'part' has sparse gradients"),
        (Regression, None, object(), "strategy='fsdp2' communicates"),
    ],
)
def test_a_brain_that_communicates_within_the_passes_raises_an_error(
    cls: Any, part: Any, sharding: Any, reason: str
) -> None:
    brain = make(cls)
    brain._lightning.sharding = sharding
    brain.modules["left_out"] = None
    if part is not None:
        brain.modules["part"] = nn.Sequential(part)
    with TemporaryAttributes() as temporary, pytest.raises(UnsupportedError) as caught:
        synchronize_oom(brain, temporary)
    assert str(caught.value).startswith(
        f"oom_patience is not supported with several processes here: {reason}"
    )
    assert not brain._lightning.synchronizes_oom


def test_speechbrains_own_fit_batch_does_not_call_brain_lightnings() -> None:
    assert calls_ours(make(Around), "fit_batch")
    own = speechbrain.Brain({"model": nn.Linear(1, 1)})
    assert not calls_ours(own, "fit_batch")


class Shared(BatchFlags):
    are_shared = True  # type: ignore[assignment]


def test_an_error_is_not_mistaken_for_an_earlier_shared_error() -> None:
    flags = Shared()

    def error(is_shared: bool) -> torch.OutOfMemoryError:
        found = torch.OutOfMemoryError()
        if is_shared:
            flags.share(found)
        return found

    # Each error is freed before the next is created, so that ids are usually reused.
    assert len({id(error(False)) for _ in range(20)}) < 20
    assert [flags.is_everywhere(error(n % 2 == 0)) for n in range(20)] == [True, False] * 10
