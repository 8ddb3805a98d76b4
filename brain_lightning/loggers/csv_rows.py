"""The rows of a Trainer's CSVLogger of one folder, over the processes that one run takes."""

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
# Part of a run: what is resumed in the middle of it does it again from its start, hooks and
# all (see ``RunProgress``). Its first entry says of which kind it is.
Section = tuple[str | int, ...]
START: Section = ("START",)
# What is not done again; a row that waits may be of any section.
ANY: Section = ()
# Callbacks hear of the start of a batch in any of these.
BEFORE_BATCH_IS_FITTED = (Phase.FETCHED, Phase.BATCH_OVER, Phase.VALIDATED, Phase.FITTING)
# Of a row: its section, its names and, where the section alone says nothing, its step.
Key = tuple[Section, frozenset[str], float | None]


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
    again takes the place of the row that is there, of that step and those names: one for one,
    for batches of one update log rows that differ in their values alone.

    Args:
        log_dir: The folder.
        section: Returns the section of the run that is going on.

    Attributes:
        has_begun: Whether ``begin`` or ``resume`` was called.
        saved_step: The step of the last checkpoint: what is logged of that after the
            checkpoint, as of a validation, is not logged again by a run that resumes from it.
    """

    def __init__(self, log_dir: str, section: Callable[[], Section]) -> None:
        self.has_begun = False
        self.saved_step = -1
        self._section = section
        self._rows = 0
        # By index: rows of sections that a run resumed from now on does again.
        self._repeated: dict[int, Section] = {}
        # Rows that this run was resumed to log again: their indices, and their steps.
        self._waiting: dict[Key, deque[tuple[int, str]]] = defaultdict(deque)
        # By index: what it has logged again, and not written.
        self._again: dict[int, Mapping[str, Any]] = {}
        super().__init__(log_dir)
        self._file = Path(self.metrics_file_path)

    def begin(self) -> None:
        """Begins a run: rows of another one are deleted, with Lightning's warning."""
        self.delete_earlier()
        self._record_early_rows()

    def resume(self, step: int, rows: int = 0, repeated: Mapping[int, Section] = {}) -> None:
        """Resumes a run.

        Args:
            step: The first that it is going to log again. What else has it is of a validation
                whose last batch made no update, and is not logged again.
            rows: How many it had when it was saved; more may be there.
            repeated: Which of them it is going to log again, by their index, and in which
                section.
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
        """What ``resume`` needs beside the step."""
        waiting = {i: key[0] for key, rows in self._waiting.items() for i, _ in rows}
        return {"rows": self._rows, "repeated": waiting | self._repeated}

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Records a row."""
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
            # An epoch that is resumed in its middle starts again, at another step.
            self._again[index] = {**row, "step": step}

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
        """Writes the rows that were recorded."""
        if not self.has_begun:
            return
        if self._again:
            # Once for all of them.
            rows: dict[int, Mapping[str, Any]] = dict(enumerate(rows_of(self._file)))
            self._write((rows | self._again).values())
            self._again = {}
        super().save()

    def rewrite(self, names: Sequence[str]) -> None:
        """Writes the file again, with more columns; it is whole at any time.

        Args:
            names: Of all columns.
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
    """What a Trainer's CSVLoggers have written of a run.

    Made before Lightning opens them. Others than those of a folder on this machine, which
    was chosen, are left to Lightning.

    Args:
        loggers: The Trainer's.
        progress: Of the run.
    """

    def __init__(self, loggers: Sequence[Logger], progress: RunProgress) -> None:
        self._writers = {
            str(index): writer
            for index, logger in enumerate(loggers)
            if (writer := _writer_of(logger, partial(_section, progress))) is not None
        }

    def begin(self) -> None:
        """Begins a run."""
        for writer in self._writers.values():
            if not writer.has_begun:
                writer.begin()

    def resume(self, saved: Mapping[str, Mapping[str, Any]], step: int) -> None:
        """Resumes a run.

        Args:
            saved: What ``save`` returned.
            step: Of Lightning's loggers, at which it is resumed.
        """
        for name, writer in self._writers.items():
            if not writer.has_begun:
                writer.resume(step, **saved.get(name, {}))

    def save(self, step: int) -> dict[str, dict[str, Any]]:
        """Writes what was logged before a checkpoint.

        Args:
            step: Of Lightning's loggers.

        Returns:
            What the rows are, for ``resume``.
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
