"""Epoch counters: SpeechBrain's two classes, and when a counter is advanced."""

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

# Relative improvement below which a score does not count as better
# (speechbrain.utils.epoch_loop.EpochCounterWithStopper).
MIN_DELTA = 1e-6


@hooks.register_checkpoint_hooks
class EpochCounter:
    """Counts epochs from 1 to ``limit``. Checkpoints save its position.

    The counter is an iterator, not a sequence. A counter that reached its end stays at its
    end. A counter that was recovered from a checkpoint continues from the saved epoch
    (``speechbrain.utils.epoch_loop.EpochCounter``).

    Args:
        limit: Number of epochs.
    """

    def __init__(self, limit: int) -> None:
        self.current = 0
        self.limit = int(limit)
        # SpeechBrain's Checkpointer may save the counter before a Brain is created.
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
    """``EpochCounter`` that stops early when a metric no longer improves.

    Call ``update_metric`` once per validation stage
    (``speechbrain.utils.epoch_loop.EpochCounterWithStopper``).

    Args:
        limit: Largest number of epochs.
        limit_to_stop: Number of epochs without improvement after which to stop.
        limit_warmup: Number of epochs at the start in which the metric is ignored.
        direction: ``"min"`` if a smaller metric is better, else ``"max"``.

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
        """Compares the metric with the best one so far, and decides whether to stop.

        Args:
            current_metric: Metric of the epoch that is ending.
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
    """Epoch numbers that also end when the Trainer has ended the training.

    Args:
        numbers: Any iterable without a position, such as a range or a list.
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
    """Makes an epoch counter end with the training, for an overridden ``fit``.

    Args:
        epoch_counter: Any iterable of epoch numbers.
        is_over: Whether the Trainer has ended the training.
        temporary: Records the changes, to undo them later.

    Returns:
        The counter itself if it has a position, because recipes read and save it. Else a
        ``StoppableEpochs``.
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
    """Epoch numbers 1, 2, … of the Trainer, for a ``fit`` without an epoch counter.

    A second ``fit`` and a resumed run continue the count.

    Args:
        over: Returns the number of epochs that the Trainer has completed.
    """

    def __init__(self, over: Callable[[], int]) -> None:
        self._over = over

    @property
    def current(self) -> int:
        """Last epoch that is over; the attribute that counters with a position have."""
        return self._over()

    def __iter__(self) -> Iterator[int]:
        while True:
            yield self._over() + 1


class Epochs:
    """Advances an epoch counter exactly when ``for epoch in epoch_counter`` would.

    Lightning checks more than once whether a run is over. Only the first check after the end
    of an epoch may call ``next()``, because ``next()`` advances an ``EpochCounter``.

    Args:
        epoch_counter: Any iterable of epoch numbers.

    Attributes:
        counter: ``epoch_counter``.
        current: Epoch that the counter returned last.
        is_collective: Whether several ranks run the same epochs.

    Raises:
        TypeError: ``epoch_counter`` is not iterable.
    """

    is_collective = False

    def __init__(self, epoch_counter: Iterable[Any]) -> None:
        # iter() also accepts an object that defines only __getitem__.
        counts: Any = epoch_counter
        if not isinstance(counts, Iterable) and not hasattr(counts, "__getitem__"):
            raise TypeError(
                f"epoch_counter must be iterable, got {epoch_counter!r}. For ten epochs, use "
                "EpochCounter(limit=10) or range(1, 11)."
            )
        # A counter that was advanced or recovered before this run has a position.
        self.current: Any = getattr(epoch_counter, "current", None) or None
        self.counter = epoch_counter
        # chain() calls iter() on the counter only when the first epoch is requested.
        self._epochs: Iterator[Any] = itertools.chain(epoch_counter)
        self._is_waiting = False

    def over(self, ended: bool) -> bool:
        """Whether the run is over on all ranks. If it is not, an epoch is waiting.

        Args:
            ended: Whether the Trainer of this rank has ended the run.

        Raises:
            RankMismatchError: The ranks are at different epochs.
        """
        return self.ended(ended) or not self.more()

    def ended(self, ended: bool) -> bool:
        """Whether the Trainer of any rank has ended the run.

        Args:
            ended: Whether the Trainer of this rank has ended the run.

        Raises:
            RankMismatchError: The ranks are at different epochs.
        """
        if self.is_collective:
            answers = compare("asks whether the training is over", ended)
            if any(answers) and not all(answers) and if_main_process():
                ends = by_rank(["ends" if each else "does not" for each in answers])
                logger.warning(
                    "The Trainer ends the training on some ranks (%s). It ends on all ranks.",
                    ends,
                )
            ended = any(answers)
        return ended

    def more(self) -> bool:
        """Whether there is another epoch. Advances the counter unless an epoch is waiting."""
        if not self._is_waiting:
            position, last = _position(self.counter), self.current
            for epoch in self._epochs:
                self.current, self._is_waiting = epoch, True
                break
            if self.is_collective:
                self._follow_first_rank(position, last)
        return self._is_waiting

    def resume(self, number: Any) -> None:
        """Resumes an epoch that the counter has already counted.

        Args:
            number: Number that the counter yielded.
        """
        self.current, self._is_waiting = number, True

    def _follow_first_rank(self, position: int | None, last: Any) -> None:
        """Follows the decision of rank 0, because all ranks resume from its checkpoints.

        Args:
            position: Position of the counter before it was advanced.
            last: Previous epoch.
        """
        found = self.current if isinstance(self.current, int) else None
        answers = compare("begins an epoch", (position, self._is_waiting, found))
        _check_epochs(answers)
        (_, more, epoch), own = answers[0], self._is_waiting
        if any(has_more != more for _, has_more, _ in answers) and if_main_process():
            logger.warning(
                "The epoch counters of the ranks differ (%s). All ranks follow rank 0. Give "
                "an epoch counter that stops early the same metric on every rank.",
                by_rank([_describe(*each) for each in answers]),
            )
        if own != more:
            self._is_waiting, self.current = more, epoch if more else last
            if position is not None:
                self.counter.current = epoch if more else position  # type: ignore[attr-defined]

    def skip(self, epochs: int) -> None:
        """Skips completed epochs, for a counter that does not save its position.

        Args:
            epochs: Number of epochs to skip.
        """
        self._epochs = itertools.islice(self._epochs, epochs, None)

    def start(self) -> Any:
        """Starts the epoch that is waiting.

        Returns:
            Its number, or the value that the counter yielded.
        """
        self._is_waiting = False
        return self.current

    def stop(self) -> None:
        """Ends the run after this epoch, like ``break`` in SpeechBrain's loop."""
        self._epochs = iter(())


# Position of the counter, whether there is another epoch, and the number of that epoch.
Answer = tuple[int | None, bool, int | None]


def _position(counter: Any) -> int | None:
    """Returns the position of a counter, or None if the counter has no integer position."""
    current = getattr(counter, "current", None)
    return current if isinstance(current, int) else None


def _check_epochs(answers: Sequence[Answer]) -> None:
    """Raises if positions or epoch numbers differ: then the states differ between ranks."""
    first_position, more, first_epoch = answers[0]
    positions = any(position != first_position for position, _, _ in answers)
    going = [epoch for _, has_more, epoch in answers if has_more]
    numbers = more and any(epoch != first_epoch for epoch in going)
    unknown = more and first_epoch is None and len(going) < len(answers)
    if positions or numbers or unknown:
        raise RankMismatchError(
            "the ranks are at different epochs "
            f"({by_rank([_describe(*each) for each in answers])}). {REMEDY}"
        )


def _describe(position: int | None, more: bool, epoch: int | None) -> str:
    after = "" if position is None else f" after epoch {position}"
    begins = "begins an epoch" if epoch is None else f"begins epoch {epoch}"
    return begins if more else f"ends{after}"
