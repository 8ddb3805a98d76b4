"""Ranks agree on the checkpoint and on each epoch; or all of them end, in the same words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from brain_lightning.distributed import agreement
from brain_lightning.stages import epochs
from tests.support.brains import dataset, make
from tests.support.processes import TORCHRUN, check_python

from . import disagreements as scenarios

RANKS = (0, 1)
Outcomes = Callable[[Any], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What each rank did in a scenario, and what it was told."""
    folder = tmp_path_factory.mktemp("disagreements")
    check_python(*TORCHRUN, "-m", scenarios.__name__, str(folder))
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in RANKS]
    return lambda scenario: [rank[scenario.__name__] for rank in ranks]


def results(outcomes: Outcomes, scenario: Any) -> list[Any]:
    """The results of both ranks, neither of which has failed."""
    assert [rank["error"] for rank in outcomes(scenario)] == [None, None]
    return [rank["result"] for rank in outcomes(scenario)]


def errors(outcomes: Outcomes, scenario: Any) -> list[str]:
    return [rank["error"] or "none" for rank in outcomes(scenario)]


def told(outcomes: Outcomes, scenario: Any) -> list[str]:
    return [rank["told"] for rank in outcomes(scenario)]


@pytest.mark.parametrize(
    "scenario", [scenarios.stopper_of_rank_0, scenarios.speechbrains_stopper]
)
def test_all_stop_where_the_counter_of_rank_0_stops(outcomes: Outcomes, scenario: Any) -> None:
    assert results(outcomes, scenario) == [3, 3]
    main, other = told(outcomes, scenario)
    assert "(rank 0: ends after epoch 3; rank 1: begins epoch 4)" in main
    assert not other


def test_none_stops_where_the_counter_of_another_rank_stops(outcomes: Outcomes) -> None:
    assert results(outcomes, scenarios.stopper_of_rank_1) == [5, 5]
    main, _ = told(outcomes, scenarios.stopper_of_rank_1)
    assert "(rank 0: begins epoch 4; rank 1: ends after epoch 3)" in main


def test_a_range_is_as_long_as_that_of_rank_0(outcomes: Outcomes) -> None:
    one, other = results(outcomes, scenarios.ranges)
    assert one == other
    assert one[-1] == ("VALID", 3)


def test_a_trainer_that_stops_on_one_rank_stops_all(outcomes: Outcomes) -> None:
    assert results(outcomes, scenarios.trainer_of_rank_1) == [2, 2]
    assert "(rank 0: does not; rank 1: ends)" in told(outcomes, scenarios.trainer_of_rank_1)[0]


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        (scenarios.epochs_apart, "RankMismatchError: the ranks are at different epochs "
         "(rank 0: begins epoch 1; rank 1: begins epoch 2)"),
        (scenarios.updates_apart, "RankMismatchError: the ranks differ in the number "
         "of optimizer steps (rank 0: 0; rank 1: 5)"),
        (scenarios.recovered_on_rank_0_alone, "RankMismatchError: the ranks are at "
         "different points of the run (rank 0: recovers a checkpoint; rank 1: "
         "has recovered its checkpoint)"),
        (scenarios.none_on_rank_0, "CheckpointError: rank 0 has no checkpoint, but other "
         "ranks do (rank 0: none; rank 1: CKPT+one)"),
        (scenarios.damaged_on_rank_1, "CheckpointError: not every rank could recover the "
         "checkpoint of rank 0 (rank 0: recovered; rank 1: damaged)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_what_cannot_go_on_ends_every_rank_in_words(
    outcomes: Outcomes, scenario: Any, words: str
) -> None:
    assert all(error.startswith(words) for error in errors(outcomes, scenario))


@pytest.mark.parametrize(
    "scenario",
    [
        scenarios.all_damaged_on_rank_0,
        scenarios.unreadable_on_rank_0,
        scenarios.speechbrains_damaged,
    ],
)
def test_what_is_damaged_on_rank_0_is_named_on_every_rank(
    outcomes: Outcomes, scenario: Any
) -> None:
    folder = f"{scenario.__name__}/node0 is damaged. To start from scratch, move them away."
    for error in errors(outcomes, scenario):
        assert error.startswith("CheckpointError: every checkpoint in ")
        assert error.endswith(folder)


def test_a_rank_that_cannot_write_ends_all(outcomes: Outcomes) -> None:
    main, other = errors(outcomes, scenarios.no_space_on_rank_1)
    assert (
        "rank 0: recovered; rank 1: CheckpointError('the checkpoint of rank 0 could " in main
    )
    assert "could not be written to " in other
    assert "no space left. Set TMPDIR" in other


@pytest.mark.parametrize(
    "scenario",
    [
        scenarios.without_shared_disk,
        scenarios.speechbrains_without_shared_disk,
        scenarios.in_pieces,
    ],
)
def test_a_checkpoint_on_the_disk_of_rank_0_is_recovered_by_all(
    outcomes: Outcomes, scenario: Any
) -> None:
    both = results(outcomes, scenario)
    for (_, before), (epoch, recovered), weights, _ in both:
        assert epoch == 2
        assert torch.equal(recovered, before)
        assert not torch.equal(recovered, weights[0])
    (*_, weights, saved), (*_, others, not_saved) = both
    assert (saved, not_saved) == (4, 0)
    assert all(map(torch.equal, weights, others))
    for words in told(outcomes, scenario):
        assert "(rank 0: CKPT+" in words
        assert "; rank 1: none). All ranks recover CKPT+" in words


def test_nothing_is_sent_where_all_read_the_same_disk(outcomes: Outcomes) -> None:
    one, other = results(outcomes, scenarios.with_shared_disk)
    assert one[1][0] == other[1][0] == 2
    assert torch.equal(one[2][0], other[2][0])
    assert told(outcomes, scenarios.with_shared_disk) == ["", ""]


@pytest.mark.parametrize(
    ("scenario", "name"),
    [
        (scenarios.same_name_other_content, "CKPT+one"),
        (scenarios.damaged_on_rank_0, "CKPT+old"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_rank_0_recovers_all_recover(
    outcomes: Outcomes, scenario: Any, name: str
) -> None:
    (one, saved), (other, own) = results(outcomes, scenario)
    assert not torch.equal(saved, own)
    for weight, path, epoch in (one, other):
        assert torch.equal(weight, saved)
        assert (path, epoch) == (name, 1)
    expected = "rank 1: another CKPT+one" if name == "CKPT+one" else "is skipped: "
    assert all(expected in words for words in told(outcomes, scenario))


def test_a_process_that_evaluates_alone_recovers_alone(outcomes: Outcomes) -> None:
    assert results(outcomes, scenarios.evaluated_on_rank_1_alone) == [False, True]


def test_one_process_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (agreement, epochs):
        monkeypatch.setattr(module, "compare", None)
    brain = make()
    brain.fit(range(2), dataset())
    assert brain.optimizer_step > 0
