"""The rows of a Trainer's CSVLogger of one folder, over the processes that one run takes."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from brain_lightning.lightning_internals import loggers as internals

Row = dict[str, str]


def rows_of(file: Path) -> list[Row]:
    """The rows of a CSV file, without those that a kill, or a power cut, has left damaged.

    Args:
        file: The file, which need not be there.
    """
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8", errors="replace")
    # What has no end of line may be half a number.
    lines = [line for line in text.split("\n")[:-1] if "\0" not in line]
    return [row for row in csv.DictReader(lines) if _is_whole(row)]


def _is_whole(row: dict[Any, Any]) -> bool:
    # A field too many is a list, one too few is None.
    try:
        float(row["step"])
    except (KeyError, TypeError, ValueError):
        return False
    return all(isinstance(value, str) for value in row.values())


class RunWriter(internals.WriterParts, ExperimentWriter):
    """Writes the rows of one run, which may take several processes.

    Lightning's deletes those of earlier processes at once. Here ``begin`` or ``resume`` says
    what becomes of them, and rows are kept in memory until then. What a resumed run logs
    again, by its step and its names, replaces what is there.

    Args:
        log_dir: The folder.

    Attributes:
        has_begun: Whether ``begin`` or ``resume`` was called.
        rows: How many rows the run has.
        saved_step: The step of the last checkpoint: what is logged of that after the
            checkpoint, as of a validation, is not logged again by a run that resumes from it.
    """

    def __init__(self, log_dir: str) -> None:
        self.has_begun = False
        self.rows = 0
        self.saved_step = -1
        self._earlier: set[tuple[float, frozenset[str]]] = set()
        super().__init__(log_dir)
        self._file = Path(self.metrics_file_path)

    def begin(self) -> None:
        """Begins a run: rows of another one are deleted, with Lightning's warning."""
        self.delete_earlier()
        self.has_begun = True

    def resume(self, rows: int, step: int) -> None:
        """Resumes a run.

        Args:
            rows: How many it had when it was saved; more may be there.
            step: The first that it is going to log again. What else has it is of a validation
                whose last batch made no update, and is not logged again.
        """
        found = rows_of(self._file)
        kept = [*found[:rows], *(row for row in found[rows:] if float(row["step"]) <= step)]
        self._earlier = {_key(row) for row in kept}
        self.metrics_keys[:] = kept[0] if kept else []
        self._write(kept)
        self.rows = len(kept)
        self.has_begun = True

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Records a row."""
        super().log_metrics(metrics_dict, step)
        self.rows += 1
        key = _key({name: str(value) for name, value in self.metrics[-1].items()})
        if key in self._earlier:
            self._earlier.remove(key)
            self._write(row for row in rows_of(self._file) if _key(row) != key)
            self.rows -= 1
        if key[0] <= self.saved_step:
            self.save()

    def save(self) -> None:
        """Writes the rows that were recorded."""
        if self.has_begun:
            super().save()

    def rewrite(self, names: Sequence[str]) -> None:
        """Writes the file again, with more columns; it is whole at any time.

        Args:
            names: Of all columns.
        """
        self._write(rows_of(self._file))

    def _write(self, rows: Iterable[Row]) -> None:
        kept, part = list(rows), self._file.with_suffix(".part")
        with part.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            if self.metrics_keys:
                writer.writeheader()
            writer.writerows(kept)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._file)


def _key(row: Mapping[str, str]) -> tuple[float, frozenset[str]]:
    names = (name for name, value in row.items() if value != "" and name != "step")
    return float(row["step"]), frozenset(names)


class RunRows:
    """What a Trainer's CSVLoggers have written of a run.

    Made before Lightning opens them. Others than those of a folder on this machine, which
    was chosen, are left to Lightning.

    Args:
        loggers: The Trainer's.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._writers = {
            str(index): writer
            for index, logger in enumerate(loggers)
            if (writer := _writer_of(logger)) is not None
        }

    def begin(self) -> None:
        """Begins a run."""
        for writer in self._writers.values():
            if not writer.has_begun:
                writer.begin()

    def resume(self, saved: Mapping[str, int], step: int) -> None:
        """Resumes a run.

        Args:
            saved: What ``save`` returned.
            step: Of Lightning's loggers, at which it is resumed.
        """
        for name, writer in self._writers.items():
            if not writer.has_begun:
                writer.resume(saved.get(name, 0), step)

    def save(self, step: int) -> dict[str, int]:
        """Writes what was logged before a checkpoint.

        Args:
            step: Of Lightning's loggers.

        Returns:
            How many rows there are, for ``resume``.
        """
        for writer in self._writers.values():
            writer.saved_step = step
            writer.save()
        return {name: writer.rows for name, writer in self._writers.items()}


def _writer_of(logger: Logger) -> RunWriter | None:
    if not isinstance(logger, CSVLogger) or "://" in str(logger.save_dir):
        return None
    if not internals.is_open(logger) and internals.has_version(logger):
        internals.open_with(logger, RunWriter(logger.log_dir))
    writer = logger.experiment if internals.is_open(logger) else None
    return writer if isinstance(writer, RunWriter) else None
