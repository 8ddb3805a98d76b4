"""Recipes that bring a loop of their own, on both sides, compared bit for bit."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from .own_loops import ENDED, IN_ONE_PROCESS, SCENARIOS
from .sides import OURS, PATCHED, SPEECHBRAIN, Record, Side, assert_equal, assert_same_run, run


@functools.cache
def by_speechbrain(scenario: Any) -> tuple[Record, Any]:
    return run(SPEECHBRAIN, scenario)


@pytest.mark.parametrize("side", [OURS, PATCHED], ids=lambda side: side.name)
@pytest.mark.parametrize(
    "scenario", SCENARIOS + IN_ONE_PROCESS, ids=lambda scenario: scenario.__name__
)
def test_a_loop_of_ones_own_gives_the_same_bits_in_the_same_order(
    scenario: Any, side: Side
) -> None:
    assert_same_run(scenario, side, by_speechbrain(scenario))


@pytest.mark.parametrize("side", [OURS, PATCHED], ids=lambda side: side.name)
@pytest.mark.parametrize("scenario", ENDED, ids=lambda scenario: scenario.__name__)
def test_a_loop_of_ones_own_that_the_trainer_ends(scenario: Any, side: Side) -> None:
    theirs, _ = by_speechbrain(scenario)
    # SpeechBrain's own loop goes on without batches, and draws numbers.
    assert_equal(run(side, scenario)[0], theirs, random=False)
    assert theirs.results[0] > 0
