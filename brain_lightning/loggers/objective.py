"""Reports the best value of one metric of a run to a hyperparameter search."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from brain_lightning.distributed.communication import ddp_barrier, is_launched
from brain_lightning.errors import RecipeError, RunOptionError
from brain_lightning.stage import Stage
from brain_lightning.stages.metrics import BETTER, Record, staged

from .atomic_file import atomically_replaced

# Environment variable with the path where Orion expects the objective of a trial. The file has
# the format of orion.client.report_objective.
ORION = "ORION_RESULTS_PATH"


class Objective(Callback):
    """Prints the best value of a metric when a recipe has finished, as the last line.

    The metric has a name that callbacks can monitor. A name with a stage is ``valid_WER``. A
    name without a stage, ``WER``, selects the metric of VALID, then a metric without stage,
    then the metric of TEST. The value is the best one of all epochs, including epochs before a
    run was resumed. If several Brains report the metric, the Brain that started last is used.
    If Orion has started the run, the value is also written to Orion's file.

    Args:
        wanted: Name of the metric, followed by ``:max`` if larger values are better.
        file: Path of a JSON file for the value, its epoch and the last value.

    Raises:
        RunOptionError: ``wanted`` has a mode other than ``min`` and ``max``, or the file
            cannot be created.
    """

    def __init__(self, wanted: str, file: str | None = None) -> None:
        self._name, _, mode = wanted.partition(":")
        self._mode = mode or "min"
        if not self._name or self._mode not in BETTER:
            raise RunOptionError(
                f"--report={wanted} is not valid. Use the name of a metric, optionally with "
                f"{' or '.join(f':{mode}' for mode in BETTER)}, such as --report=WER:min. The "
                "default is min."
            )
        self._file = None if file is None else _checked(Path(file))
        # The records of each Brain, in the order in which the Brains were started last.
        self._records: list[Mapping[str, Record]] = []

    @property
    def monitor(self) -> str | None:
        """Name of the metric, if it is checked before training to warn of a wrong name."""
        return None if self._name.startswith(staged(Stage.TEST, "")) else self._name

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stores the records of a Brain, which may not exist any more when the recipe ends."""
        brain: Any = pl_module.brain
        records = brain._lightning.records
        self._records = [*(each for each in self._records if each is not records), records]

    def report(self) -> None:
        """Prints the value on rank 0, after the output of all ranks.

        Raises:
            RecipeError: The metric was not reported, or was never finite.
        """
        sys.stdout.flush()
        ddp_barrier()
        # The script may have ended the process group.
        if is_launched() and os.environ["RANK"] != "0":
            return
        name, record = self._found()
        (value, epoch), (last, _) = record[self._mode], record["last"]
        print(value, flush=True)  # noqa: T201
        if self._file is not None:
            result = {"name": name, "value": value, "mode": self._mode, "epoch": epoch}
            _write(self._file, {**result, "last": last if math.isfinite(last) else None})
        if path := os.environ.get(ORION):
            # Orion minimizes the objective.
            least = value if self._mode == "min" else -value
            _write(Path(path), [{"name": name, "type": "objective", "value": least}])

    def _found(self) -> tuple[str, Record]:
        names = [staged(Stage.VALID, self._name), self._name, staged(Stage.TEST, self._name)]
        found = [
            (name, each[name])
            for name in names
            for each in reversed(self._records)
            if name in each
        ]
        if not found:
            known = dict.fromkeys(name for each in self._records for name in each)
            raise RecipeError(
                f"--report={self._name}: the recipe has not reported a metric with this name. "
                f"Reported metrics: {', '.join(known) or 'none'}."
            )
        name, record = found[0]
        if self._mode not in record:
            raise RecipeError(f"--report={self._name}: {name} was never finite.")
        return name, record


def _checked(file: Path) -> Path:
    """Checks before training that the file can be written after training."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunOptionError(
            f"--report-file={file}: its folder cannot be created ({error.strerror}). Use "
            "another path."
        ) from error
    if file.is_dir():
        raise RunOptionError(f"--report-file={file} is a folder. Use the path of a file.")
    return file


def _write(file: Path, content: Any) -> None:
    with atomically_replaced(file) as part:
        part.write_text(json.dumps(content) + "\n", encoding="utf-8")
