"""A run that is interrupted at any event and resumed equals an uninterrupted run."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from tests.support.events import Event
from tests.support.interruption_points import Points
from tests.support.traces import Trace, different
from tests.support.upstream import needs_lightning
from tests.system.interruptions import SETTINGS, check_with_ranks, quiet


@pytest.fixture(autouse=True)
def quietly() -> Iterator[None]:
    threads = torch.get_num_threads()
    quiet()
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


# All points of all settings: python -m tests.system.interruptions
@pytest.mark.parametrize(
    ("name", "way", "every"),
    [
        ("two-accumulation", "trainer", 13),
        ("callbacks", "error", 13),
        ("gan", "ours-within", 19),
        ("lean-accumulation", "ours", 7),
        ("loader-accumulation", "speechbrain", 17),
        pytest.param("halves-accumulation", "error-last", 19, marks=needs_lightning("2.5.4")),
        ("workers-accumulation", "ours-within", 61),
        ("own-loop-callbacks", "ours-within", 97),
        pytest.param("average", "trainer", 29, marks=needs_lightning("2.6")),
    ],
)
def test_interrupted_anywhere(name: str, way: str, every: int) -> None:
    points, failures = Points(SETTINGS[name], way).check_every(every // 2, every)
    assert points
    assert not failures, failures


def test_two_processes_that_are_interrupted() -> None:
    points, failures = check_with_ranks("processes", "trainer", 40, 61)
    assert points
    assert not failures, failures


# ------------------------------------------------------------------------ the judge


def event(name: str, step: int, *told: float) -> Event:
    return Event(name, (1, step, step, None), told)


START = event("on_stage_start TRAIN", 0)
ALONE = [
    START,
    *(
        event(name, step, 0.5)
        for step in (1, 2)
        for name in ("fetch TRAIN", "on_fit_batch_start", "on_fit_batch_end")
    ),
    event("on_stage_end TRAIN", 2),
    *(
        event(name, 3)
        for name in ("on_stage_start VALID", "fetch VALID", "on_stage_end VALID")
    ),
    event("callback.on_train_epoch_end", 3),
]


@pytest.mark.parametrize(
    ("point", "by_error", "begins"),
    [
        (0, True, {0}),
        (0, False, {1}),
        (1, False, {1}),
        (5, True, {4}),
        (5, False, {4}),
        (6, False, {7}),
        (7, True, {7}),
        (9, False, {8}),
        (10, True, {8, 10}),
        (10, False, {11}),
        (11, False, {12}),
    ],
)
def test_where_a_run_may_go_on(point: int, by_error: bool, begins: set[int]) -> None:
    assert Trace(ALONE).may_begin(point, by_error) == begins


@pytest.mark.parametrize(
    ("heard", "problem"),
    [
        ([START, *ALONE[4:]], None),
        (ALONE[4:], "begins: with on_stage_start TRAIN not before it"),
        ([START, *ALONE[1:]], "begins: with fetch TRAIN (epoch 1, step 1, 1 updates), not "),
        ([START, *ALONE[5:]], "begins: with on_fit_batch_start (epoch 1, step 2"),
        ([START, *ALONE[4:9], *ALONE[10:]], "order: on_stage_end VALID"),
        ([START, *ALONE[4:6], event("on_fit_batch_end", 2, 0.6), *ALONE[7:]], "told: on_fit"),
        ([START, *ALONE[4:], ALONE[-1]], "order: callback.on_train_epoch_end"),
        ([], "begins: with the end"),
    ],
)
def test_what_is_wrong_with_a_trace(heard: list[Event], problem: str | None) -> None:
    found = Trace(ALONE).differs(heard, {4})
    assert found is None if problem is None else str(found).startswith(problem)


def test_what_is_over_is_not_started_again() -> None:
    assert Trace(ALONE).differs(ALONE[11:], {11}) is None
    assert Trace(ALONE).differs([START, *ALONE[11:]], {11}) is not None
    assert Trace(ALONE).differs([], {12}) is None


def test_a_batch_that_was_fetched_before_a_validation() -> None:
    fetch, *batch = (event(name, 1) for name in ("fetch TRAIN", "on_fit_batch_end"))
    valid = [event(f"on_stage_{which} VALID", 0) for which in ("start", "end")]
    trace = Trace([START, fetch, *valid, *batch, event("on_stage_end TRAIN", 1)])
    assert trace.may_begin(1, True) == trace.may_begin(2, True) == {1}
    assert trace.may_begin(3, False) == trace.may_begin(4, True) - {4, 5} == {3}
    for begin, heard in ((1, [fetch, *valid]), (3, [fetch])):
        rest = [START, *heard, *batch, event("on_stage_end TRAIN", 1)]
        assert trace.differs(rest, {begin}) is None
    assert trace.differs([START, fetch, valid[0]], {1}, 3) is None
    assert trace.differs([START, fetch, *valid, *batch], {3}, 5) is not None


def test_states_are_compared_bit_for_bit() -> None:
    one = {"a": torch.ones(2), "b": 1, "c": 2}
    assert different(one, {"a": torch.ones(2), "b": 1, "c": 2}) == []
    other = {"a": torch.ones(2) + 1e-7, "b": True, "d": 2}
    assert [problem.split()[0].rstrip(":") for problem in different(one, other)] == list(
        "abcd"
    )
