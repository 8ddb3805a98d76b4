"""Epoch counters: SpeechBrain's two, and when any of them is advanced."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from typing import Any

from brain_lightning.checkpoints import epoch_files, hooks
from brain_lightning.distributed.agreement import REMEDY, by_rank, compare
from brain_lightning.distributed.communication import if_main_process
from brain_lightning.errors import RankMismatchError
from brain_lightning.temporary import TemporaryAttributes

logger = logging.getLogger(__name__)

# A score has to be better by this fraction to count as an improvement
# (speechbrain.utils.epoch_loop.EpochCounterWithStopper).
MIN_DELTA = 1e-6


@hooks.register_checkpoint_hooks
class EpochCounter:
    """Counts epochs from 1 to ``limit``; its position is saved in checkpoints.

    An iterator, not a sequence: a counter that was iterated to its end stays at
    its end, and one that was recovered from a checkpoint continues from there
    (``speechbrain.utils.epoch_loop.EpochCounter``).

    Args:
        limit: The number of epochs.
    """

    def __init__(self, limit: int) -> None:
        self.current = 0
        self.limit = int(limit)
        # SpeechBrain's Checkpointer may be asked to save it before there is a Brain.
        hooks.share_with_speechbrain()

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self.current >= self.limit:
            raise StopIteration
        self.current += 1
        logger.info("Going into epoch %d", self.current)
        return self.current

    @hooks.mark_as_saver
    def _save(self, path: str | PathLike[str]) -> None:
        epoch_files.save_counter(self, path)

    @hooks.mark_as_loader
    @hooks.mark_as_transfer
    def _recover(self, path: str | PathLike[str], end_of_epoch: bool = True) -> None:
        epoch_files.load_counter(self, path, end_of_epoch)


@hooks.register_checkpoint_hooks
class EpochCounterWithStopper(EpochCounter):
    """An ``EpochCounter`` that ends early when a metric stops improving.

    Call ``update_metric`` once per validation stage
    (``speechbrain.utils.epoch_loop.EpochCounterWithStopper``).

    Args:
        limit: The largest number of epochs.
        limit_to_stop: Epochs without improvement after which to stop.
        limit_warmup: Epochs at the start during which nothing is compared.
        direction: ``"min"`` where a smaller metric is better, else ``"max"``.

    Raises:
        ValueError: ``limit_to_stop`` or ``limit_warmup`` is negative, or
            ``direction`` is neither ``"min"`` nor ``"max"``.
    """

    def __init__(
        self, limit: int, limit_to_stop: int, limit_warmup: int, direction: str
    ) -> None:
        super().__init__(limit)
        for name, value in [("limit_to_stop", limit_to_stop), ("limit_warmup", limit_warmup)]:
            if value < 0:
                raise ValueError(f"Stopper {name!r} must be >= 0, got {value}")
        if direction not in ("min", "max"):
            raise ValueError(f"Stopper 'direction' must be 'min' or 'max', got {direction!r}")
        self.limit_to_stop = limit_to_stop
        self.limit_warmup = limit_warmup
        self.direction = direction
        self.should_stop = False
        self.best_limit = 0
        self.sign = 1 if direction == "min" else -1
        self.best_score = self.sign * float("inf")

    def __next__(self) -> int:
        if self.should_stop:
            raise StopIteration
        return super().__next__()

    def update_metric(self, current_metric: float) -> None:
        """Compares the newest value with the best one and decides whether to stop.

        Args:
            current_metric: The metric of the epoch that is ending.
        """
        if self.current <= self.limit_warmup:
            return
        if self.sign * current_metric < self.sign * (1 - MIN_DELTA) * self.best_score:
            self.best_limit = self.current
            self.best_score = current_metric
        waited = self.current - self.best_limit
        self.should_stop = waited >= self.limit_to_stop
        if self.should_stop:
            logger.info(
                "%d epochs without improvement.\nPatience of %d is exhausted, stopping.",
                waited,
                self.limit_to_stop,
            )

    @hooks.mark_as_saver
    def _save(self, path: str | PathLike[str]) -> None:
        epoch_files.save_stopper(self, path)

    @hooks.mark_as_loader
    @hooks.mark_as_transfer
    def _recover(self, path: str | PathLike[str], end_of_epoch: bool = True) -> None:
        epoch_files.load_stopper(self, path, end_of_epoch)


class StoppableEpochs:
    """Epoch numbers that end as well when the Trainer has ended the training.

    Args:
        numbers: Any iterable that has no position, such as a range or a list.
        is_over: Whether the Trainer has ended the training.
    """

    def __init__(self, numbers: Any, is_over: Callable[[], bool]) -> None:
        self.numbers = numbers
        self.is_over = is_over

    def __iter__(self) -> Iterator[Any]:
        numbers = iter(self.numbers)
        while not self.is_over():
            for number in numbers:
                yield number
                break
            else:
                return

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        return self.numbers[index]

    def __eq__(self, other: object) -> bool:
        return bool(self.numbers == other)

    __hash__ = None  # type: ignore[assignment]


def make_stoppable(
    epoch_counter: Any, is_over: Callable[[], bool], temporary: TemporaryAttributes
) -> Any:
    """An epoch counter for a recipe's own ``fit``, which iterates it.

    Args:
        epoch_counter: Any iterable of epoch numbers.
        is_over: Whether the Trainer has ended the training.
        temporary: Records what is changed.

    Returns:
        The counter itself where it has a position, which recipes read and save.
    """
    cls: Any = type(epoch_counter)
    if not isinstance(epoch_counter, Iterator) or not hasattr(epoch_counter, "__dict__"):
        return StoppableEpochs(epoch_counter, is_over)

    def __next__(self: Any) -> Any:  # noqa: N807
        if is_over():
            raise StopIteration
        return cls.__next__(self)

    own = {"__next__": __next__, "__module__": cls.__module__}
    temporary.set(epoch_counter, "__class__", type(cls.__name__, (cls,), own))
    return epoch_counter


class EpochsOfTrainer:
    """The epochs where nobody has given a counter: 1, 2, … as the Trainer counts them.

    It counts on in a second ``fit``, and where it resumes.

    Args:
        over: Returns how many epochs are over, for the Trainer.
    """

    def __init__(self, over: Callable[[], int]) -> None:
        self._over = over

    @property
    def current(self) -> int:
        """The last epoch that is over, as a counter with a position has it."""
        return self._over()

    def __iter__(self) -> Iterator[int]:
        while True:
            yield self._over() + 1


class Epochs:
    """Advances an epoch counter exactly when ``for epoch in epoch_counter`` would.

    Lightning asks more than once whether a run is over; only the first question
    after an epoch has ended may call ``next()``, which advances an ``EpochCounter``.

    Args:
        epoch_counter: Any iterable of epoch numbers.

    Attributes:
        counter: ``epoch_counter``.
        current: The epoch it returned last.
        is_collective: Whether several processes run the same epochs.

    Raises:
        TypeError: ``epoch_counter`` is not iterable.
    """

    is_collective = False

    def __init__(self, epoch_counter: Iterable[Any]) -> None:
        # A counter may also be a sequence by __getitem__ alone, which iter() takes.
        counts: Any = epoch_counter
        if not isinstance(counts, Iterable) and not hasattr(counts, "__getitem__"):
            raise TypeError(
                f"epoch_counter must be iterable, got {epoch_counter!r}: use "
                "EpochCounter(limit=10) or range(1, 11) for ten epochs"
            )
        # A counter that was advanced before, or recovered, has a position.
        self.current: Any = getattr(epoch_counter, "current", None) or None
        self.counter = epoch_counter
        # Calls iter() on the counter only when the first epoch is asked for.
        self._epochs: Iterator[Any] = itertools.chain(epoch_counter)
        self._is_waiting = False

    def over(self, ended: bool) -> bool:
        """Whether the run is over, here and in all processes; else an epoch is waiting.

        Args:
            ended: Whether the Trainer of this process has ended it.

        Raises:
            RankMismatchError: The processes are at different epochs.
        """
        return self.ended(ended) or not self.more()

    def ended(self, ended: bool) -> bool:
        """Whether the Trainer has ended the run, in any of the processes.

        Args:
            ended: Whether that of this process has.

        Raises:
            RankMismatchError: The processes are at different epochs.
        """
        if self.is_collective:
            answers = compare("asks whether the training is over", ended)
            if any(answers) and not all(answers) and if_main_process():
                ends = by_rank(["ends" if each else "does not" for each in answers])
                logger.warning("A Trainer ends the training (%s), and with it all do.", ends)
            ended = any(answers)
        return ended

    def more(self) -> bool:
        """Whether there is an epoch to run; advances the counter unless one is waiting."""
        if not self._is_waiting:
            position, last = _position(self.counter), self.current
            for epoch in self._epochs:
                self.current, self._is_waiting = epoch, True
                break
            if self.is_collective:
                self._follow_first_rank(position, last)
        return self._is_waiting

    def resume(self, number: Any) -> None:
        """Resumes an epoch that the counter has counted already.

        Args:
            number: What the counter yielded.
        """
        self.current, self._is_waiting = number, True

    def _follow_first_rank(self, position: int | None, last: Any) -> None:
        """Begins or ends as the first process does, whose checkpoints all resume from.

        Args:
            position: Of the counter, before it was asked.
            last: The epoch before.
        """
        found = self.current if isinstance(self.current, int) else None
        answers = compare("begins an epoch", (position, self._is_waiting, found))
        _check_epochs(answers)
        (_, more, epoch), own = answers[0], self._is_waiting
        if any(has_more != more for _, has_more, _ in answers) and if_main_process():
            logger.warning(
                "The epoch counters of the processes differ (%s): all do as rank 0. One that "
                "stops early needs the same number on every rank.",
                by_rank([_in_words(*each) for each in answers]),
            )
        if own != more:
            self._is_waiting, self.current = more, epoch if more else last
            if position is not None:
                self.counter.current = epoch if more else position  # type: ignore[attr-defined]

    def skip(self, epochs: int) -> None:
        """Skips epochs that were done before, and that the counter does not remember.

        Args:
            epochs: How many.
        """
        self._epochs = itertools.islice(self._epochs, epochs, None)

    def start(self) -> Any:
        """Begins the epoch that is waiting.

        Returns:
            Its number, or whatever the counter yields.
        """
        self._is_waiting = False
        return self.current

    def stop(self) -> None:
        """Ends the run after this epoch, as ``break`` would."""
        self._epochs = iter(())


# The counter's position, whether there is another epoch, and its number.
Answer = tuple[int | None, bool, int | None]


def _position(counter: Any) -> int | None:
    """The position of a counter that has one, and so can be set to another."""
    current = getattr(counter, "current", None)
    return current if isinstance(current, int) else None


def _check_epochs(answers: Sequence[Answer]) -> None:
    """Refuses positions, or numbers, that differ: that is another state, not a decision."""
    first_position, more, first_epoch = answers[0]
    positions = any(position != first_position for position, _, _ in answers)
    going = [epoch for _, has_more, epoch in answers if has_more]
    numbers = more and any(epoch != first_epoch for epoch in going)
    unknown = more and first_epoch is None and len(going) < len(answers)
    if positions or numbers or unknown:
        raise RankMismatchError(
            "the processes are at different epochs "
            f"({by_rank([_in_words(*each) for each in answers])}): {REMEDY}"
        )


def _in_words(position: int | None, more: bool, epoch: int | None) -> str:
    after = "" if position is None else f" after epoch {position}"
    begins = "begins an epoch" if epoch is None else f"begins epoch {epoch}"
    return begins if more else f"ends{after}"
