"""A loader that Lightning may hold, measure and ``iter()`` without any effect on the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from brain_lightning.data.dataloaders import length_of

_NOTHING = object()


class StageLoader:
    """The batches of one stage, fetched exactly when a Brain would fetch them.

    Lightning makes a training iterator before training starts, may make it
    twice, prefetches where there is no length, and keeps a length for as long
    as it runs. Each would use the random number generator, start workers or
    count batches at another time than SpeechBrain. So ``iter()`` has no effect
    here, and a pass begins with the first batch after ``start()``.

    Args:
        loader: What ``fit`` or ``evaluate`` was given.
        batches: Turns ``loader`` into one pass over it.
    """

    def __init__(
        self, loader: Iterable[Any], batches: Callable[[Iterable[Any]], Iterator[Any]]
    ) -> None:
        self.loader = loader
        self._make_pass = batches
        self._pass: Iterator[Any] = iter(())
        self._ahead: Any = _NOTHING

    def __len__(self) -> int:
        """For those who display it; exhaustion ends a pass.

        Never 0: Lightning skips a stage whose loader is empty, while SpeechBrain
        runs its hooks.

        Raises:
            TypeError: The loader has none, which is ``inf`` for Lightning.
        """
        length = self.known_length()
        if length is None:
            raise TypeError(f"{type(self.loader).__name__} has no length")
        return max(1, length)

    def known_length(self) -> int | None:
        """The loader's own length, now, or None where it has none."""
        return length_of(self.loader)

    def start(self) -> None:
        """Begins a new pass; nothing is fetched yet."""
        self.close()
        self._pass = iter(self._make_pass(self.loader))

    def close(self) -> None:
        """Ends the pass, and with it the loader's iterator and workers."""
        old, self._pass = self._pass, iter(())
        self._ahead = _NOTHING
        if hasattr(old, "close"):
            old.close()

    def fetch(self) -> bool:
        """Fetches the next batch unless one is waiting.

        Returns:
            Whether there is one.
        """
        if self._ahead is _NOTHING:
            self._ahead = next(self._pass, _NOTHING)
        return self._ahead is not _NOTHING

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch, self._ahead = self._ahead, _NOTHING
        return next(self._pass) if batch is _NOTHING else batch
