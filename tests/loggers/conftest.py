"""Makes TensorBoard logs independent of the clock."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import pytest
from tensorboard.summary.writer import event_file_writer


@pytest.fixture(autouse=True)
def a_second_for_each_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads its files in the order of the timestamps in their names."""
    seconds = itertools.count(int(time.time()))
    clock = SimpleNamespace(time=lambda: next(seconds))
    monkeypatch.setattr(event_file_writer, "time", clock)
