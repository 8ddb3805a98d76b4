"""Finds an initial learning rate by training with increasing rates.

The rates, the smoothing and the stop criterion are those of Lightning's ``Tuner.lr_find``. A
Brain therefore gets the same suggestion as a LightningModule (Smith 2017,
https://arxiv.org/abs/1506.01186).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from numbers import Real
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from brain_lightning.distributed.communication import gather, if_main_process
from brain_lightning.errors import UnsupportedError
from brain_lightning.lightning_internals.trainer_callbacks import LearningRates, learning_rates
from brain_lightning.protocol import BrainProtocol, hparams_of, optimizers_of
from brain_lightning.stages.run import Run

from .trial import Trial

logger = logging.getLogger(__name__)

# Weight of the previous average in the smoothed loss.
MOMENTUM = 0.98
# First steps without a suggestion, because the average of so few losses is noise.
SKIPPED = 10
# The slope at a rate is measured from SPAN steps before to SPAN steps after it. The loss has
# to fall there by at least this fraction.
SPAN = 4
LEAST = 0.01
# Hyperparameters that are set if the callback does not name one.
NAMES = ("lr", "learning_rate")


@dataclass(frozen=True)
class Search:
    """Arguments of a search, as in ``Tuner.lr_find``.

    Attributes:
        min_lr: Learning rate of the first step.
        max_lr: Learning rate of the last step.
        num_training: Number of steps.
        mode: ``exponential`` or ``linear``.
        early_stop_threshold: The search stops if the smoothed loss exceeds the smallest
            smoothed loss times this value. None disables this.
    """

    min_lr: float = 1e-8
    max_lr: float = 1.0
    num_training: int = 100
    mode: str = "exponential"
    early_stop_threshold: float | None = 4.0

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step.

        Args:
            step: Index of the step, starting from 0.
        """
        if step == 0:
            return self.min_lr
        part = (step + 1) / self.num_training
        if self.mode == "linear":
            return self.min_lr + part * (self.max_lr - self.min_lr)
        return float(self.min_lr * (self.max_lr / self.min_lr) ** part)


class _Losses:
    """Smooths the losses of a search and detects divergence."""

    def __init__(self, threshold: float | None) -> None:
        self.smoothed: list[float] = []
        self._threshold = threshold
        self._average, self._best = 0.0, 0.0

    def add(self, loss: float) -> bool:
        """Adds the loss of a step, and returns whether the loss diverges."""
        step = len(self.smoothed) + 1
        self._average = MOMENTUM * self._average + (1 - MOMENTUM) * loss
        smoothed = self._average / (1 - MOMENTUM ** (step + 1))
        self.smoothed.append(smoothed)
        if smoothed < self._best or step == 1:
            self._best = smoothed
        if self._threshold is None or step == 1:
            return False
        return not math.isfinite(smoothed) or smoothed > self._threshold * self._best


def find(run: Run, trainer: Trainer, loader: Any, search: Search) -> LearningRates:
    """Searches for an initial learning rate in a trial.

    Args:
        run: The run, between two batches, with its optimizers created.
        trainer: The Trainer that runs it.
        loader: Training DataLoader of the run.
        search: Arguments of the search.

    Returns:
        The rates with their losses, and the suggested rate.

    Raises:
        UnsupportedError: The Brain has no optimizer, or there is no training batch.
    """
    brain = run.brain
    if next(optimizers_of(brain), None) is None:
        raise UnsupportedError(
            f"{type(brain).__name__} has no optimizer, so there is no learning rate to search"
        )
    losses, rates = _Losses(search.early_stop_threshold), list[float]()
    trial, bar = Trial(run, trainer, loader), _bar(search)
    with trial, _rising_rates(brain, rates), bar:
        trial.start()
        windows = _windows(_endless(trial, loader), brain.grad_accumulation_factor)
        for step, window in zip(range(search.num_training), windows, strict=False):
            rates.append(search.rate(step))
            own = [trial.fit(batch) for batch in window]
            # All ranks use the same average, so they stop at the same step.
            everywhere = gather(sum(own) / len(own))
            bar.update()
            if losses.add(sum(everywhere) / len(everywhere)):
                logger.info("The loss diverges at a learning rate of %.3g.", rates[-1])
                break
    return learning_rates(search.mode, search.min_lr, search.max_lr, rates, losses.smoothed)


def _endless(trial: Trial, loader: Any) -> Iterator[Any]:
    """Yields the batches of the DataLoader again and again."""
    while True:
        batches = trial.batches(loader)
        first = next(batches, None)
        if first is None:
            raise UnsupportedError(
                "the learning rate search needs at least one training batch"
            )
        yield first
        yield from batches


def _windows(batches: Iterator[Any], size: int) -> Iterator[Iterator[Any]]:
    """Yields the batches of each optimizer step."""
    while True:
        yield islice(batches, size)


@contextmanager
def _rising_rates(brain: BrainProtocol, rates: list[float]) -> Iterator[None]:
    """Makes all optimizers step with the last rate of a list, whatever an annealing sets."""

    def set_rate(optimizer: Optimizer, *_: Any) -> None:
        _set_rate(optimizer, rates[-1])

    handles: list[RemovableHandle] = [
        optimizer.register_step_pre_hook(set_rate) for _, optimizer in optimizers_of(brain)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _set_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _bar(search: Search) -> Any:
    return tqdm(
        desc="learning rates", total=search.num_training, disable=not if_main_process(),
        dynamic_ncols=True,
    )  # fmt: skip


def unbiased(losses: Sequence[float]) -> list[float]:
    """Corrects the bias of the smoothed losses from the initial average of 0.

    Lightning's correction uses one step too many. With it the first loss is half of its value,
    and the curve rises before it falls.

    Args:
        losses: Smoothed losses from ``find``.
    """
    return [
        loss * (1 - MOMENTUM ** (step + 1)) / (1 - MOMENTUM**step)
        for step, loss in enumerate(losses, 1)
    ]


def suggestion(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """Returns the rate at which the loss falls fastest per step of the search.

    Lightning divides the change of the loss by the change of the rate (since 2.5.3, "Compute
    the gradient of losses w.r.t. learning rates"). With exponentially growing rates this
    selects one of the smallest rates, because noise dominates there.

    Args:
        rates: Learning rates that grow by a constant factor.
        losses: Smoothed loss at each rate, from ``unbiased``.

    Returns:
        The rate. None if the loss does not fall at any rate.
    """
    falls = [
        ((losses[i + SPAN] - losses[i - SPAN]) / abs(losses[i - SPAN]), rates[i])
        for i in range(SKIPPED + SPAN, len(rates) - SPAN)
        if math.isfinite(losses[i + SPAN]) and losses[i - SPAN] != 0
    ]
    fall, rate = min(falls, default=(0.0, 0.0))
    return rate if fall < -LEAST else None


def apply(brain: BrainProtocol, rate: float, name: str = "") -> None:
    """Sets the learning rate of all optimizers of a Brain, also of those it creates later.

    Args:
        brain: The Brain.
        rate: The learning rate.
        name: Hyperparameter to set. By default ``lr`` and ``learning_rate`` are set, if they
            exist.

    Raises:
        UnsupportedError: There is no hyperparameter with this name.
    """
    known = hparams_of(brain)
    if name and name not in known:
        raise UnsupportedError(
            f"attr_name={name!r} is not a hyperparameter of {type(brain).__name__}. Use one "
            f"of those that are numbers: {_numbers(known)}."
        )
    found = [each for each in NAMES if isinstance(known.get(each), Real)]
    for each in [name] if name else found:
        known[each] = rate
    brain._lightning.learning_rate = rate
    set_learning_rate(brain)


def set_learning_rate(brain: BrainProtocol) -> None:
    """Sets the learning rate that a search found on all optimizers, if there was a search.

    Args:
        brain: The Brain, with its optimizers created.
    """
    rate = brain._lightning.learning_rate
    if rate is not None:
        for _, optimizer in optimizers_of(brain):
            _set_rate(optimizer, rate)


def _numbers(known: Any) -> str:
    found = [name for name, value in known.items() if isinstance(value, Real)]
    return ", ".join(found) or "none"
