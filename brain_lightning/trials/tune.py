"""The callback of ``brain-lightning tune``, which searches instead of training."""

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
    """Result of a search.

    Attributes:
        name: ``lr``, ``batch_size`` or ``max_batch_length``.
        value: Suggested value, or None if the losses do not suggest a value.
        before: Values before the search: the rate of each parameter group, or one size.
        rates: Learning rates that were tried.
        losses: Smoothed loss at each rate.
    """

    name: str
    value: float | None
    before: set[float]
    rates: Sequence[float] = ()
    losses: Sequence[float] = ()


class Tuned(SystemExit):
    """Ends a recipe's script after a search."""


class TuneFirstFit(Callback):
    """Searches at the start of a recipe's first epoch, and then ends the recipe.

    At this point the DataLoader is known, even if an overridden ``fit`` creates it.

    Args:
        kind: ``lr`` or ``batch``.

    Attributes:
        found: Result of the search, or None before the search.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self.found: Found | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Searches.

        Raises:
            Tuned: The search has finished.
            UnsupportedError: The recipe overrides ``_fit_train`` with a custom loop.
        """
        module: Any = pl_module
        run: Run = module.run
        if run.train.by_recipe is not None:
            raise UnsupportedError(
                f"{type(run.brain).__name__}._fit_train is a custom loop, so a search does "
                "not have its batches. Call super()._fit_train(...) in it."
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
