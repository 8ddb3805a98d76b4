"""The learning rate to begin with: losses at rising rates (Lightning's ``Tuner.lr_find``).

The rates, the smoothing and the end of the search are Lightning's, so that a Brain gets the
suggestion that a LightningModule would get (Smith 2017, https://arxiv.org/abs/1506.01186).
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

# How much of the smoothed loss stays at each step.
MOMENTUM = 0.98
# The average of so few losses is noise: nothing is suggested among them.
SKIPPED = 10
# A fall is from so many steps before a rate to as many after it, and by this part of the loss.
SPAN = 4
LEAST = 0.01
# Where nobody names another attribute of the hyperparameters.
NAMES = ("lr", "learning_rate")


@dataclass(frozen=True)
class Search:
    """How to search, as the arguments of ``Tuner.lr_find``.

    Attributes:
        min_lr: The rate of the first step.
        max_lr: The rate of the last step.
        num_training: The number of steps.
        mode: ``exponential`` or ``linear``.
        early_stop_threshold: Ends the search where the smoothed loss is so many times the
            smallest one; None for never.
    """

    min_lr: float = 1e-8
    max_lr: float = 1.0
    num_training: int = 100
    mode: str = "exponential"
    early_stop_threshold: float | None = 4.0

    def rate(self, step: int) -> float:
        """The learning rate of a step.

        Args:
            step: Counted from 0.
        """
        if step == 0:
            return self.min_lr
        part = (step + 1) / self.num_training
        if self.mode == "linear":
            return self.min_lr + part * (self.max_lr - self.min_lr)
        return float(self.min_lr * (self.max_lr / self.min_lr) ** part)


class _Losses:
    """The smoothed losses of a search."""

    def __init__(self, threshold: float | None) -> None:
        self.smoothed: list[float] = []
        self._threshold = threshold
        self._average, self._best = 0.0, 0.0

    def add(self, loss: float) -> bool:
        """Adds the loss of a step; returns whether it diverges."""
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
    """Searches the learning rate to begin with, in a trial.

    Args:
        run: The run, between two batches; its optimizers are made.
        trainer: The Trainer that runs it.
        loader: Its training loader.
        search: How to search.

    Returns:
        Rates and losses, and what they suggest.

    Raises:
        UnsupportedError: The Brain has no optimizer, or its data no batch.
    """
    brain = run.brain
    if next(optimizers_of(brain), None) is None:
        raise UnsupportedError(
            f"{type(brain).__name__} has no optimizer, so there is no learning rate to find"
        )
    losses, rates = _Losses(search.early_stop_threshold), list[float]()
    trial, bar = Trial(run, trainer, loader), _bar(search)
    with trial, _rising_rates(brain, rates), bar:
        trial.start()
        windows = _windows(_endless(trial, loader), brain.grad_accumulation_factor)
        for step, window in zip(range(search.num_training), windows, strict=False):
            rates.append(search.rate(step))
            own = [trial.fit(batch) for batch in window]
            # All processes end the search together.
            everywhere = gather(sum(own) / len(own))
            bar.update()
            if losses.add(sum(everywhere) / len(everywhere)):
                logger.info("The loss diverges at a learning rate of %.3g.", rates[-1])
                break
    return learning_rates(search.mode, search.min_lr, search.max_lr, rates, losses.smoothed)


def _endless(trial: Trial, loader: Any) -> Iterator[Any]:
    """Pass after pass."""
    while True:
        batches = trial.batches(loader)
        first = next(batches, None)
        if first is None:
            raise UnsupportedError("there is no training batch to find a learning rate with")
        yield first
        yield from batches


def _windows(batches: Iterator[Any], size: int) -> Iterator[Iterator[Any]]:
    """The batches of each step."""
    while True:
        yield islice(batches, size)


@contextmanager
def _rising_rates(brain: BrainProtocol, rates: list[float]) -> Iterator[None]:
    """Has every optimizer step at the last of some rates, whatever an annealing has set."""

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
    """Smoothed losses as they would be had their average not begun with 0.

    Lightning corrects for one step too many: the first loss is half of what it was, and the
    curve rises before it falls.

    Args:
        losses: From ``find``.
    """
    return [
        loss * (1 - MOMENTUM ** (step + 1)) / (1 - MOMENTUM**step)
        for step, loss in enumerate(losses, 1)
    ]


def suggestion(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The rate at which the loss falls fastest, as rates grow by one factor.

    Lightning's divides a fall by the difference of the rates (since 2.5.3, "Compute the
    gradient of losses w.r.t. learning rates"). Where rates grow by a factor, that is among the
    smallest, whatever noise there is.

    Args:
        rates: In steps of one factor.
        losses: The smoothed loss at each, from ``unbiased``.

    Returns:
        None where the loss falls nowhere.
    """
    falls = [
        ((losses[i + SPAN] - losses[i - SPAN]) / abs(losses[i - SPAN]), rates[i])
        for i in range(SKIPPED + SPAN, len(rates) - SPAN)
        if math.isfinite(losses[i + SPAN]) and losses[i - SPAN] != 0
    ]
    fall, rate = min(falls, default=(0.0, 0.0))
    return rate if fall < -LEAST else None


def apply(brain: BrainProtocol, rate: float, name: str = "") -> None:
    """Sets a learning rate on every optimizer of a Brain, now and when it makes new ones.

    Args:
        brain: The Brain.
        rate: The learning rate.
        name: Of the attribute of its hyperparameters; without one ``lr`` or
            ``learning_rate``, if there is one.

    Raises:
        UnsupportedError: There is no such attribute.
    """
    known = hparams_of(brain)
    if name and name not in known:
        raise UnsupportedError(
            f"attr_name={name!r} is no hyperparameter of {type(brain).__name__}: those that "
            f"are numbers are {_numbers(known)}"
        )
    found = [each for each in NAMES if isinstance(known.get(each), Real)]
    for each in [name] if name else found:
        known[each] = rate
    brain._lightning.learning_rate = rate
    set_learning_rate(brain)


def set_learning_rate(brain: BrainProtocol) -> None:
    """Sets what was found on every optimizer, if something was.

    Args:
        brain: The Brain, whose optimizers are made.
    """
    rate = brain._lightning.learning_rate
    if rate is not None:
        for _, optimizer in optimizers_of(brain):
            _set_rate(optimizer, rate)


def _numbers(known: Any) -> str:
    found = [name for name, value in known.items() if isinstance(value, Real)]
    return ", ".join(found) or "none"
