"""The callback of ``brain-lightning tune``: a search in place of a recipe's training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from brain_lightning.data.batch_size import BatchSize
from brain_lightning.errors import UnsupportedError
from brain_lightning.protocol import optimizers_of
from brain_lightning.stages.run import Run

from . import batch_size, learning_rate


@dataclass(frozen=True)
class Found:
    """What was found.

    Attributes:
        name: ``lr``, ``batch_size`` or ``max_batch_length``.
        value: What to use; None where the losses suggest nothing.
        before: What was in use: the rate of each group of parameters, or one size.
        rates: The learning rates that were tried.
        losses: The smoothed loss at each.
    """

    name: str
    value: float | None
    before: set[float]
    rates: Sequence[float] = ()
    losses: Sequence[float] = ()


class Tuned(SystemExit):
    """Ends a recipe's script when something is found."""


class TuneFirstFit(Callback):
    """Searches when the first epoch of a recipe begins, and ends the recipe there.

    By then the loader is known, also where the recipe's own ``fit`` brings it.

    Args:
        kind: ``lr`` or ``batch``.

    Attributes:
        found: What was found; None before.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self.found: Found | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Searches.

        Raises:
            Tuned: Something is found.
            UnsupportedError: The recipe alone knows its batches.
        """
        module: Any = pl_module
        run: Run = module.run
        if run.train.by_recipe is not None:
            raise UnsupportedError(
                f"{type(run.brain).__name__}._fit_train is a loop of the recipe's own, whose "
                "batches nobody else knows: nothing can be searched with them"
            )
        search = _find_rate if self._kind == "lr" else _find_size
        self.found = search(run, trainer, run.train.loader.loader)
        raise Tuned(0)


def _find_rate(run: Run, trainer: Trainer, loader: Any) -> Found:
    groups = (group for _, each in optimizers_of(run.brain) for group in each.param_groups)
    before = {float(group["lr"]) for group in groups}
    tried = learning_rate.find(run, trainer, loader, learning_rate.Search()).results
    rates, losses = tried["lr"], learning_rate.unbiased(tried["loss"])
    return Found("lr", learning_rate.suggestion(rates, losses), before, rates, losses)


def _find_size(run: Run, trainer: Trainer, loader: Any) -> Found:
    size = BatchSize(loader)
    before = {size.current}
    found = batch_size.find(run, trainer, loader, batch_size.Search())
    return Found(size.name, found, before)
