"""A log that goes on where a run goes on, with each epoch in it once.

A run that is killed after it has logged an epoch and before it has saved it logs that epoch
again. Whether a version was asked for, and whether anything was written, Lightning's loggers
keep to themselves: this is the only file that touches those private parts, and
``tests/test_train_logger.py`` fails where a release moves one of them.
"""

from __future__ import annotations

import csv
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

Row = dict[str, str]


def resume(logger: Logger, start: float) -> dict[str, float]:
    """Prepares a log for what a process is going to write to it.

    What a CSV file or TensorBoard's files have from there on is superseded. Where no version
    was asked for, the newest one that begins before goes on. Nothing can be taken away from a
    run of W&B or MLflow: ``is_there`` tells what to leave out.

    Args:
        logger: A logger that this process has not written to.
        start: The first epoch that is going to be logged; infinite where everything in the
            log is to stay.

    Returns:
        The last number of each name in a run that cannot be changed; else nothing.
    """
    if isinstance(logger, CSVLogger):
        _resume_csv(logger, start)
    elif isinstance(logger, TensorBoardLogger):
        _resume_tensorboard(logger, start)
    elif isinstance(logger, (WandbLogger, MLFlowLogger)):
        return _last_numbers(logger)
    return {}


def is_there(
    last: Mapping[str, float], name: str | None, numbers: Mapping[str, float]
) -> bool:
    """Whether a run that cannot be changed has an entry already.

    Args:
        last: What ``resume`` returned.
        name: Of the number that says where the entry belongs, such as ``epoch``.
        numbers: The entry.

    Returns:
        Whether it is of an epoch before the last one, or equal to what there is of that: a
        recipe may make several entries of an epoch.
    """
    if name is None or name not in last or numbers[name] > last[name]:
        return False
    return numbers[name] < last[name] or numbers.items() <= last.items()


def _last_numbers(logger: WandbLogger | MLFlowLogger) -> dict[str, float]:
    if isinstance(logger, WandbLogger):
        found = dict(logger.experiment.summary)
    else:
        found = logger.experiment.get_run(logger.run_id).data.metrics
    prefix = f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""
    return {name.removeprefix(prefix): number for name, number in found.items()}


def _resume_csv(logger: CSVLogger, start: float) -> None:
    """Lightning deletes the file of a version that is there: its rows are logged again."""
    if logger._experiment is not None:
        return
    _choose_version(logger, start, lambda folder: map(_step, _rows(folder)))
    folder = Path(logger.log_dir)
    rows = [row for row in _rows(folder) if _step(row) < start]
    if not rows:
        return
    file, aside = _csv_files(folder)
    if not aside.exists():
        # Until they are in the new file, for this process may be killed.
        file.replace(aside)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Experiment logs directory")
        writer = logger.experiment
    for row in rows:
        # As they stand there: a prefix is in their names already, and no digit may change.
        values: Any = {name: value for name, value in row.items() if value and name != "step"}
        writer.log_metrics(values, int(_step(row)))
    logger.save()
    aside.unlink()


def _csv_files(folder: Path) -> tuple[Path, Path]:
    file = folder / ExperimentWriter.NAME_METRICS_FILE
    return file, file.with_suffix(".before")


def _rows(folder: Path) -> list[Row]:
    file, aside = _csv_files(folder)
    path = aside if aside.is_file() else file
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def _step(row: Row) -> float:
    """Where a row belongs; infinitely late where a kill has left half of it."""
    try:
        return float(row["step"])
    except (KeyError, TypeError, ValueError):
        return math.inf


def _resume_tensorboard(logger: TensorBoardLogger, start: float) -> None:
    if logger._experiment is None:
        _choose_version(logger, start, _tensorboard_steps)
    if math.isfinite(start) and _has_events(Path(logger.log_dir)):
        writer = logger.experiment
        # It is said at the beginning of a file; the next entry begins one.
        writer.close()
        writer.purge_step = int(start)


def _has_events(folder: Path) -> bool:
    return any(folder.glob("*tfevents*"))


def _tensorboard_steps(folder: Path) -> Iterator[float]:
    # tensorboardX can write such files, and cannot read them.
    if not _has_events(folder) or importlib.util.find_spec("tensorboard") is None:
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    for tag in events.Tags()["scalars"]:
        yield from (event.step for event in events.Scalars(tag))


def _choose_version(
    logger: CSVLogger | TensorBoardLogger,
    start: float,
    steps_in: Callable[[Path], Iterable[float]],
) -> None:
    """Takes the newest version that has a log, if that begins before ``start``."""
    if logger._version is not None:
        return
    new = logger.version
    assert isinstance(new, int)
    for version in range(new - 1, -1, -1):
        logger._version = version
        first = min(steps_in(Path(logger.log_dir)), default=None)
        if first is not None:
            logger._version = version if first < start else new
            return
    logger._version = new
