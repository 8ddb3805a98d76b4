"""Keeps the rows of a Trainer's CSVLogger consistent when a run is resumed."""

from __future__ import annotations

import csv
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from brain_lightning.lightning_internals import loggers as internals
from brain_lightning.phase import Phase
from brain_lightning.resume.run_progress import RunProgress

Row = dict[str, str]
# A part of a run that is repeated from its start, hooks included, if the run is resumed in the
# middle of it (see ``RunProgress``). The first entry is its kind.
Section = tuple[str | int, ...]
START: Section = ("START",)
# Not a section: for rows that are not logged again, and for rows whose section is not known.
ANY: Section = ()
# Phases in which callbacks may log at the start of a batch.
BEFORE_BATCH_IS_FITTED = (Phase.FETCHED, Phase.BATCH_OVER, Phase.VALIDATED, Phase.FITTING)
# Identifies a row: section, column names and, if the section is ANY, the step.
Key = tuple[Section, frozenset[str], float | None]


def rows_of(file: Path) -> list[Row]:
    """Returns the rows of a CSV file, without rows that a crash has damaged.

    Args:
        file: The file. If it does not exist, there are no rows.
    """
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8", errors="replace")
    # A last line without a newline may be incomplete.
    lines = [line for line in text.split("\n")[:-1] if "\0" not in line]
    return [row for row in csv.DictReader(lines) if _is_whole(row)]


def _is_whole(row: dict[Any, Any]) -> bool:
    # DictReader stores extra fields as a list, and missing fields as None.
    try:
        float(row["step"])
    except (KeyError, TypeError, ValueError):
        return False
    return all(isinstance(value, str) for value in row.values())


class RunWriter(internals.WriterParts, ExperimentWriter):
    """Writes the rows of one run, which may be resumed in several processes.

    Lightning's writer deletes the rows of earlier processes immediately. This writer stores
    rows in memory until ``begin`` deletes the earlier rows or ``resume`` continues after them.
    A row that a resumed run logs again replaces the existing row with the same step and
    columns. Each existing row is replaced once, because batches of one optimizer step log
    rows that differ only in their values.

    Args:
        log_dir: Folder of the CSV file.
        section: Function that returns the current section of the run.

    Attributes:
        has_begun: Whether ``begin`` or ``resume`` was called.
        saved_step: Step of the last checkpoint. Rows of this step that are logged after the
            checkpoint, for example by a validation, are not logged again by a run that is
            resumed from it.
    """

    def __init__(self, log_dir: str, section: Callable[[], Section]) -> None:
        self.has_begun = False
        self.saved_step = -1
        self._section = section
        self._rows = 0
        # Rows, by index, whose section would be repeated if the run was resumed now.
        self._repeated: dict[int, Section] = {}
        # Indices and steps of existing rows that this run is expected to log again.
        self._waiting: dict[Key, deque[tuple[int, str]]] = defaultdict(deque)
        # Rows, by index, that were logged again and are not written yet.
        self._replacements: dict[int, Mapping[str, Any]] = {}
        super().__init__(log_dir)
        self._file = Path(self.metrics_file_path)

    def begin(self) -> None:
        """Starts a new run. Rows of another run are deleted, with Lightning's warning."""
        self.delete_earlier()
        self._record_early_rows()

    def resume(self, step: int, rows: int = 0, repeated: Mapping[int, Section] = {}) -> None:
        """Resumes a run.

        Args:
            step: First step that is logged again. Other rows of this step are from a
                validation after a batch without an update. They are not logged again.
            rows: Number of rows when the checkpoint was saved. The file may have more.
            repeated: Sections of the rows that will be logged again, by the index of the row.
        """
        found = rows_of(self._file)
        kept = [*found[:rows], *(row for row in found[rows:] if float(row["step"]) <= step)]
        for index, row in enumerate(kept):
            if index in repeated or index >= rows:
                key = _key(row, repeated.get(index, ANY))
                self._waiting[key].append((index, row["step"]))
        self.metrics_keys[:] = kept[0] if kept else []
        self._write(kept)
        self._rows = len(kept)
        self._record_early_rows()

    def state(self) -> dict[str, Any]:
        """Returns the arguments of ``resume``, except for the step."""
        waiting = {i: key[0] for key, rows in self._waiting.items() for i, _ in rows}
        return {"rows": self._rows, "repeated": waiting | self._repeated}

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Adds a row."""
        super().log_metrics(metrics_dict, step)
        if self.has_begun:
            self._record(self.metrics.pop(), self._section())

    def _record_early_rows(self) -> None:
        self.has_begun = True
        early, self.metrics = self.metrics, []
        for row in early:
            self._record(row, START)

    def _record(self, row: dict[str, float], section: Section) -> None:
        texts = {name: str(value) for name, value in row.items()}
        keys = (_key(texts, section), _key(texts, ANY))
        waiting = next((found for key in keys if (found := self._waiting.get(key))), None)
        if waiting is None:
            self._remember(self._rows, section)
            self._append(row)
        else:
            index, step = waiting.popleft()
            self._remember(index, section)
            # The step of the existing row, because a resumed epoch starts at another step.
            self._replacements[index] = {**row, "step": step}

    def _append(self, row: dict[str, float]) -> None:
        self._rows += 1
        self.metrics.append(row)
        if row["step"] <= self.saved_step:
            self.save()

    def _remember(self, index: int, section: Section) -> None:
        if section == ANY:
            return
        is_over = {each for each in self._repeated.values() if each[0] == section[0]} - {
            section
        }
        kept = {i: each for i, each in self._repeated.items() if each not in is_over}
        self._repeated = {**kept, index: section}

    def save(self) -> None:
        """Writes the rows that were added."""
        if not self.has_begun:
            return
        if self._replacements:
            # The file is rewritten once for all replacements.
            rows: dict[int, Mapping[str, Any]] = dict(enumerate(rows_of(self._file)))
            self._write((rows | self._replacements).values())
            self._replacements = {}
        super().save()

    def rewrite(self, names: Sequence[str]) -> None:
        """Rewrites the file with more columns. The file is replaced atomically.

        Args:
            names: Names of all columns.
        """
        self._write(rows_of(self._file))

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        kept, part = list(rows), self._file.with_suffix(".part")
        with part.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            if self.metrics_keys:
                writer.writeheader()
            writer.writerows(kept)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._file)


def _key(row: Row, section: Section) -> Key:
    names = (name for name, value in row.items() if value != "" and name != "step")
    return section, frozenset(names), float(row["step"]) if section == ANY else None


class RunRows:
    """The rows that a Trainer's CSVLoggers write for a run.

    It has to be created before Lightning opens the loggers. It handles only loggers that write
    to a fixed version in a local folder.

    Args:
        loggers: Loggers of the Trainer.
        progress: Progress of the run.
    """

    def __init__(self, loggers: Sequence[Logger], progress: RunProgress) -> None:
        self._writers = {
            str(index): writer
            for index, logger in enumerate(loggers)
            if (writer := _writer_of(logger, partial(_section, progress))) is not None
        }

    def begin(self) -> None:
        """Starts a new run."""
        for writer in self._writers.values():
            if not writer.has_begun:
                writer.begin()

    def resume(self, saved: Mapping[str, Mapping[str, Any]], step: int) -> None:
        """Resumes a run.

        Args:
            saved: Return value of ``save``.
            step: Step of Lightning's loggers at which the run is resumed.
        """
        for name, writer in self._writers.items():
            if not writer.has_begun:
                writer.resume(step, **saved.get(name, {}))

    def save(self, step: int) -> dict[str, dict[str, Any]]:
        """Writes the rows that were logged before a checkpoint.

        Args:
            step: Step of Lightning's loggers.

        Returns:
            State of the rows, for ``resume``.
        """
        for writer in self._writers.values():
            writer.saved_step = step
            writer.save()
        return {name: writer.state() for name, writer in self._writers.items()}


def _section(progress: RunProgress) -> Section:
    phase, epochs = progress.phase, progress.epochs
    if phase is Phase.EPOCH_OVER and (progress.resumed is not None or not epochs):
        return START
    if phase is Phase.STARTING:
        return ("EPOCH", epochs)
    if phase is Phase.VALIDATING:
        return ("VALIDATION", epochs, progress.position.fitted)
    if phase in BEFORE_BATCH_IS_FITTED:
        return ("BATCH", epochs, progress.position.fitted)
    return ANY


def _writer_of(logger: Logger, section: Callable[[], Section]) -> RunWriter | None:
    if not isinstance(logger, CSVLogger) or "://" in str(logger.save_dir):
        return None
    if not internals.is_open(logger) and internals.has_version(logger):
        internals.open_with(logger, RunWriter(logger.log_dir, section))
    writer = logger.experiment if internals.is_open(logger) else None
    return writer if isinstance(writer, RunWriter) else None
