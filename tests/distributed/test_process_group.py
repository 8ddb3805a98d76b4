"""A process group that is there before a script's own, in the place of none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import timedelta

import pytest
from torch import distributed

from brain_lightning.distributed import process_group as module
from brain_lightning.distributed.process_group import process_group
from tests.support.ports import free_port


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": free_port()}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def test_it_ends_with_a_script_that_makes_none() -> None:
    with process_group("gloo"):
        assert distributed.get_backend() == "gloo"
        with pytest.raises(ValueError, match="twice"):
            # Torch's own function, of a script that has made one already.
            distributed.distributed_c10d.init_process_group("gloo")
    assert not distributed.is_initialized()


def test_nothing_of_it_is_found_by_the_scripts_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another process it would find where that one was before."""
    store = distributed.HashStore()
    monkeypatch.setattr(module, "rendezvous", lambda *_, **__: iter([(store, 0, 1)]))
    with process_group("gloo"):
        keys = store.num_keys()
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        assert store.num_keys() == 2 * keys > 0


def test_an_error_leaves_it_to_the_others() -> None:
    with pytest.raises(ZeroDivisionError), process_group("gloo"):
        1 / 0  # noqa: B018
    assert distributed.is_initialized()


def test_a_scripts_own_takes_its_place_once() -> None:
    initialize = distributed.init_process_group
    with process_group("gloo"):
        before = distributed.group.WORLD
        distributed.init_process_group("gloo", timeout=timedelta(seconds=9))
        own = distributed.group.WORLD
        assert own is not before
        # As torch's: a rank before each line of a traceback, but not two.
        assert sys.excepthook.__closure__ is not None
        held = [cell.cell_contents for cell in sys.excepthook.__closure__]
        assert sys.__excepthook__ in held
        with pytest.raises(ValueError, match="twice"):
            distributed.init_process_group("gloo")
    assert distributed.group.WORLD is own
    assert distributed.init_process_group is initialize
