"""That benchmarks run, and count and compare what they say; nothing here looks at a time."""

from __future__ import annotations

import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from . import gpu
from .measure import Waits
from .report import Figure, Report, parser


def test_each_contestant_of_the_gpu_runs_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    work, steps = gpu.tasks("cpu")["Linear(10, 10)"]
    with gpu.quiet():
        rows = [gpu.table(work, steps, 1, valid) for valid in (False, True)]
    report = Report(parser("A benchmark.").parse_args(["--json", str(tmp_path / "figures")]))
    report.table("steps", rows[0])
    report.table("validation", rows[1])
    report.end()
    found = json.loads((tmp_path / "figures").read_text())
    assert found["benchmark"] == "gpu"
    assert found["versions"]["torch"] == version("torch")
    steps_of, valid_of = (table["rows"] for table in found["tables"])
    assert list(steps_of) == list(gpu.TRAINING)
    assert list(valid_of) == ["SpeechBrain", "brain.fit"]
    for row in (*steps_of.values(), *valid_of.values()):
        assert row["time"]["rounds"] == 1
        assert row["time"]["value"]["lowest"] > 0
        assert row["time"]["ratio"]["median"] > 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in gpu.TRAINING)


def test_a_ratio_is_the_median_of_those_of_each_round() -> None:
    # The medians alone would give 1.
    figure = Figure([1.0, 4.0, 9.0], "us", base=[2.0, 8.0, 4.0], bound=0.5)
    assert figure.ratios == [0.5, 0.5, 2.25]
    assert figure.holds
    assert str(figure) == "4 us  0.50 (0.50-1.38)  <= 0.50 holds"
    assert str(Figure([3.0], "ms", bound=2.0)) == "3 ms  <= 2.00 DOES NOT HOLD"


def test_waits_for_events_count_as_those_that_torch_warns_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Event:
        waited = 0

        def synchronize(self) -> None:
            self.waited += 1

    monkeypatch.setattr(torch, "Event", Event)
    with Waits() as waits:
        event = torch.Event()
        event.synchronize()
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("of something else", stacklevel=1)
    assert (waits.count, event.waited, torch.Event) == (2, 1, Event)
