"""The callback that plots the metrics of a training after each epoch."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from itertools import chain, count
from os import PathLike
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Callback, LightningModule, Trainer

from brain_lightning.distributed.communication import if_main_process
from brain_lightning.errors import RunOptionError, UnsupportedError
from brain_lightning.optimizers.active import all_optimizers
from brain_lightning.protocol import hparam

from .curves import History, is_rate, read_curves, write_curves

logger = logging.getLogger(__name__)


class CurvePlot(Callback):
    """Plots the losses and the metrics that a recipe reports, at the end of each epoch.

    The metrics are stored in the PNG file. A resumed run therefore continues the curves, with
    each epoch once, independent of its checkpoints. Each Brain that runs with the callback has
    a separate file: ``curves.png``, ``curves-2.png``, … Only rank 0 writes.

    Args:
        path: Path of the PNG file. By default ``curves.png`` in the recipe's
            ``output_folder``, or in the current folder if there is no ``output_folder``.

    Raises:
        RunOptionError: ``path`` does not end in ``.png``.
        UnsupportedError: matplotlib is not installed.
    """

    def __init__(self, path: str | PathLike[str] | None = None) -> None:
        if path is not None and Path(path).suffix.lower() != ".png":
            raise RunOptionError(
                f"CurvePlot writes PNG files, so {str(path)!r} must end in .png."
            )
        if importlib.util.find_spec("matplotlib") is None:
            raise UnsupportedError(
                "CurvePlot needs matplotlib, which is not installed. Run `pip install "
                "matplotlib`."
            )
        self._path = None if path is None else Path(path)
        self._taken: set[Path] = set()
        self._curves: WeakKeyDictionary[Any, _Curves] = WeakKeyDictionary()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Selects the path of the PNG file before training."""
        brain = pl_module.brain
        if brain not in self._curves:
            self._curves[brain] = _Curves(self._free_path(brain))
        if stage == "fit":
            self._curves[brain].begins = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the learning rates before the VALID stage anneals them."""
        self._curves[pl_module.brain].rates = _rates(pl_module.brain)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the learning rates of an epoch without a validation."""
        self._curves[pl_module.brain].rates = _rates(pl_module.brain)

    def on_brain_metrics(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        epoch: Any,
        metrics: Mapping[str, float],
    ) -> None:
        """Plots the metrics of a stage. ``BrainModule`` calls this hook of every callback.

        Args:
            trainer: The Trainer.
            pl_module: LightningModule of the Brain.
            epoch: Epoch from the epoch counter, or None in TEST.
            metrics: Metrics by name.
        """
        if not metrics or not if_main_process():
            return
        curves = self._curves[pl_module.brain]
        try:
            curves.add_test(metrics) if epoch is None else curves.add_epoch(epoch, metrics)
        except OSError as error:
            # A failed plot must not end the training. The next epoch plots again.
            logger.warning("CurvePlot could not write the plot: %s", error)

    def _free_path(self, brain: Any) -> Path:
        folder = hparam(brain, "output_folder", "")
        first = (self._path or Path(folder, "curves.png")).resolve()
        first.parent.mkdir(parents=True, exist_ok=True)
        others = (first.with_stem(f"{first.stem}-{number}") for number in count(2))
        path = next(path for path in chain([first], others) if path not in self._taken)
        self._taken.add(path)
        return path


class _Curves:
    """The curves of one Brain.

    Args:
        path: Path of the PNG file.

    Attributes:
        begins: Whether a run has started and has not reported an epoch yet.
        rates: Learning rates, for recipes that do not report them.
    """

    def __init__(self, path: Path) -> None:
        self.begins = False
        self.rates: dict[str, float] = {}
        self._path = path
        self._history: History = {}
        self._tests: list[Mapping[str, float]] = []

    def add_epoch(self, epoch: Any, metrics: Mapping[str, float]) -> None:
        """Adds metrics of an epoch, in one or several calls."""
        # An epoch counter may yield any numeric type, or objects that are not numbers.
        epoch = float(epoch) if hasattr(epoch, "__float__") else len(self._history) + 1.0
        if self.begins:
            known = self._history or read_curves(self._path)
            # A run that was killed may have plotted epochs that are not in its checkpoint.
            self._history = {number: known[number] for number in known if number < epoch}
            self.begins = False
        rates = {} if any(map(is_rate, metrics)) else self.rates
        self._history[epoch] = {**self._history.get(epoch, {}), **metrics, **rates}
        # Earlier tests used the weights before this epoch.
        self._tests.clear()
        write_curves(self._path, self._history, self._tests)

    def add_test(self, metrics: Mapping[str, float]) -> None:
        """Adds metrics of one test set. A recipe may have several test sets."""
        self._history = self._history or read_curves(self._path)
        self._tests.append({n: v for n, v in metrics.items() if n.startswith("test_")})
        write_curves(self._path, self._history, self._tests)


def _rates(brain: Any) -> dict[str, float]:
    rates = {
        f"lr_{name}": float(optimizer.param_groups[0]["lr"])
        for name, optimizer in all_optimizers(brain).items()
    }
    return {"lr": rates.popitem()[1]} if len(rates) == 1 else rates
