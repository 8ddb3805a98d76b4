"""Rows of a CSVLogger that a resumed run logs again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from brain_lightning.loggers.csv_rows import ANY, RunWriter, Section, rows_of


class Writes(RunWriter):
    """Counts how often the full file is written."""

    whole_files = 0

    def _write(self, rows: Any) -> None:
        self.whole_files += 1
        super()._write(rows)


class Process:
    """A process that writes rows of a run until it is killed."""

    def __init__(self, folder: Path, saved: dict[str, Any] | None = None) -> None:
        self.section: Section = ANY
        self.writer = Writes(str(folder / "log"), lambda: self.section)
        if saved is None:
            self.writer.begin()
        else:
            self.writer.resume(1, **saved)

    def log(self, *losses: float, step: int = 1, section: Section = ANY) -> None:
        self.section = section
        for loss in losses:
            self.writer.log_metrics({"loss": loss}, step)

    def save(self) -> dict[str, Any]:
        self.writer.save()
        return self.writer.state()


@pytest.fixture
def losses(tmp_path: Path) -> Any:
    return lambda: [float(row["loss"]) for row in rows_of(tmp_path / "log" / "metrics.csv")]


def test_rows_past_a_checkpoint_are_replaced_one_for_one(tmp_path: Path, losses: Any) -> None:
    first = Process(tmp_path)
    first.log(0, 1)
    saved = first.save()
    first.log(2, 3, 4)
    first.save()
    for replaced in (1, 2):
        # The second process resumes from the same checkpoint, and logs more rows.
        other = Process(tmp_path, saved)
        other.log(*(12, 13, 14)[:replaced])
        later = other.save()
        assert losses() == [0, 1, *(12, 13, 14)[:replaced], *(2, 3, 4)[replaced:]]
    # This checkpoint records that the last row is still to be replaced.
    last = Process(tmp_path, later)
    last.log(24, 25)
    last.save()
    assert losses() == [0, 1, 12, 13, 24, 25]


def test_a_section_that_restarts_has_its_rows_once(tmp_path: Path, losses: Any) -> None:
    first = Process(tmp_path)
    first.log(0, step=0, section=("EPOCH", 1))
    first.log(1, section=("EPOCH", 2))
    first.log(2, section=("BATCH", 2, 0))
    first.log(3, section=("BATCH", 2, 1))
    saved = first.save()
    for _ in range(2):
        other = Process(tmp_path, saved)
        # The section restarts at a later step.
        other.log(11, step=2, section=("EPOCH", 2))
        other.log(13, 14, section=("BATCH", 2, 1))
        saved = other.save()
        assert losses() == [0, 11, 2, 13, 14]
    steps = [row["step"] for row in rows_of(tmp_path / "log" / "metrics.csv")]
    assert steps == ["0", "1", "1", "1", "1"]


def test_the_file_is_written_once_for_all_replaced_rows(tmp_path: Path, losses: Any) -> None:
    first = Process(tmp_path)
    first.log(*range(50))
    first.save()
    other = Process(tmp_path, {"rows": 0, "repeated": {}})
    other.writer.saved_step = 1
    other.log(*range(100, 150))
    assert other.writer.whole_files == 1
    other.save()
    assert losses() == list(range(100, 150))
    assert other.writer.whole_files == 2
