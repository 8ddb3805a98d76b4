"""What a search of hyperparameters optimizes: the best value of one number of a run."""

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

from .whole_file import written_whole

# Where Orion waits for the objective of a trial, as orion.client.report_objective writes it.
ORION = "ORION_RESULTS_PATH"


class Objective(Callback):
    """Prints the best value of a reported number when a recipe is over, and nothing after it.

    A number is found by the names that callbacks monitor: ``valid_WER``, or ``WER``, which
    is that of VALID, or of a recipe's own, or of TEST. It is the best of all epochs, also of
    those before a run was resumed. Where several Brains report the number, it is that of the
    one that began last. Orion finds it where it has started the run.

    Args:
        wanted: The name of the number, and ``:max`` behind it where larger is better.
        file: Where to write it as JSON, beside its epoch and the last value.

    Raises:
        RunOptionError: ``wanted`` ends with a mode that is neither ``min`` nor ``max``, or
            there can be no such file.
    """

    def __init__(self, wanted: str, file: str | None = None) -> None:
        self._name, _, mode = wanted.partition(":")
        self._mode = mode or "min"
        if not self._name or self._mode not in BETTER:
            raise RunOptionError(
                f"--report={wanted}: give the name of a number, and {' or '.join(BETTER)}, as "
                "in --report=WER:min, which --report=WER is too"
            )
        self._file = None if file is None else _checked(Path(file))
        # Of each Brain, the one that began last at the end.
        self._records: list[Mapping[str, Record]] = []

    @property
    def monitor(self) -> str | None:
        """What has to be reported in training, where a wrong name is warned of."""
        return None if self._name.startswith(staged(Stage.TEST, "")) else self._name

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Notes where the numbers of a Brain are found; it may be gone at the end."""
        brain: Any = pl_module.brain
        records = brain._lightning.records
        self._records = [*(each for each in self._records if each is not records), records]

    def report(self) -> None:
        """Prints the value, on the main process, after what the others print.

        Raises:
            RecipeError: No number of that name was reported, or none that is finite.
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
            # It minimizes.
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
                f"--report={self._name}: the recipe has reported no number of this name; it "
                f"has reported {', '.join(known) or 'none at all'}"
            )
        name, record = found[0]
        if self._mode not in record:
            raise RecipeError(f"--report={self._name}: {name} was never finite")
        return name, record


def _checked(file: Path) -> Path:
    """Refuses, before hours of training, a file that cannot be written after them."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunOptionError(f"--report-file={file}: {error.strerror}") from error
    if file.is_dir():
        raise RunOptionError(f"--report-file={file}: it is a folder, name a file")
    return file


def _write(file: Path, content: Any) -> None:
    with written_whole(file) as part:
        part.write_text(json.dumps(content) + "\n", encoding="utf-8")
