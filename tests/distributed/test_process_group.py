"""The process group that exists before a script creates its own, or if it creates none."""

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


def test_it_is_destroyed_at_the_end_of_the_script() -> None:
    with process_group("gloo"):
        assert distributed.get_backend() == "gloo"
        with pytest.raises(ValueError, match="twice"):
            # torch's own function, called by a script that already created a group.
            distributed.distributed_c10d.init_process_group("gloo")
    assert not distributed.is_initialized()


def test_the_scripts_own_group_finds_no_keys_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a shared store it would find the addresses of the previous group."""
    store = distributed.HashStore()
    monkeypatch.setattr(module, "rendezvous", lambda *_, **__: iter([(store, 0, 1)]))
    with process_group("gloo"):
        keys = store.num_keys()
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        assert store.num_keys() == 2 * keys > 0


def test_it_is_not_destroyed_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), process_group("gloo"):
        1 / 0  # noqa: B018
    assert distributed.is_initialized()


def test_the_scripts_own_group_replaces_it_once() -> None:
    initialize = distributed.init_process_group
    with process_group("gloo"):
        before = distributed.group.WORLD
        distributed.init_process_group("gloo", timeout=timedelta(seconds=9))
        own = distributed.group.WORLD
        assert own is not before
        # As torch's hook: each line of a traceback has one rank, not two.
        assert sys.excepthook.__closure__ is not None
        held = [cell.cell_contents for cell in sys.excepthook.__closure__]
        assert sys.__excepthook__ in held
        with pytest.raises(ValueError, match="twice"):
            distributed.init_process_group("gloo")
    assert distributed.group.WORLD is own
    assert distributed.init_process_group is initialize
