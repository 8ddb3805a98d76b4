"""One of two processes has no memory for a batch: both skip it, or save and end together."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity.sides import assert_equal, assert_moved
from tests.trials import tried

from . import memory_scenarios, scenarios
from .test_two_processes import of


@pytest.mark.parametrize("scenario", memory_scenarios.AVERAGED, ids=lambda s: s.__name__)
def test_gradients_are_averaged_bit_for_bit_as_by_ddp(records: Any, scenario: Any) -> None:
    """With the option; DDP's are those of SpeechBrain, or of ours where that crashes."""
    side = "speechbrain" if scenario in scenarios.SHARED else "brain_lightning"
    expected = of(records, scenario, side)
    for rank, ours in enumerate(of(records, scenario, "together")):
        assert_equal(ours, expected[rank])
        if len(ours.tensors) > 1:
            assert_moved(ours)


def test_both_skip_what_one_has_no_memory_for(records: Any) -> None:
    results = [r.results for r in of(records, memory_scenarios.skipped_by_all)]
    for rank, found in enumerate(results):
        told = [each for each in found if isinstance(each, str)]
        assert [each for each in found if not isinstance(each, str)] == [
            (True, 6), (True, 6), (True, 4), (True, 4),
        ]  # fmt: skip
        # Four batches in each of four runs; half of them for want of memory over there.
        assert len(told) == 16
        other = f"rank {1 - rank} ran out of memory in this batch, so no rank uses the batch"
        assert sum(other in each for each in told) == 8
        assert "(1 of 2 that oom_patience allows in this epoch)" in told[0]
        assert "in TRAIN, epoch 1, step 2" in told[0]


def test_both_save_and_end_and_resume_bit_for_bit(records: Any) -> None:
    for rank, record in enumerate(of(records, memory_scenarios.ended_by_all)):
        (first, saved), (second, again), *same = record.results
        assert saved == again
        assert saved == "brain_lightning: the run was saved, and resumes with this batch"
        assert ("rank 1 ran" in first, "rank 0 ran" in second) == (rank == 0, rank == 1)
        assert len(same) > 10
        assert all(same)


def test_what_processes_do_not_ask_each_other_is_said(records: Any) -> None:
    for record in of(records, memory_scenarios.not_agreed_upon):
        note, refused, of_ddp = record.results
        assert "the other ranks cannot take part in the save. Set oom_patience=0" in note
        assert refused.startswith(
            "oom_patience is not supported with several processes here: "
        )
        assert "Call super().fit_batch(batch) of brain_lightning.Brain" in refused
        assert "with several processes here: DDP's static_graph must average" in of_ddp


def test_it_costs_one_collective_for_all_flags_and_one_for_gradients(records: Any) -> None:
    # And one for the buffers of each dtype, as in DDP.
    for record in of(records, memory_scenarios.what_it_costs):
        assert record.results == [{(4, 0)}]


def test_both_try_what_one_has_no_memory_for(records: Any) -> None:
    for record in of(records, memory_scenarios.tried_by_all):
        assert record.results == [([tried.MEMORY], None), True]
