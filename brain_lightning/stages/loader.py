"""A loader on which Lightning may call ``iter()`` and ``len()`` without side effects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from brain_lightning.data.dataloaders import length_of

_NOTHING = object()


class StageLoader:
    """The batches of one stage, fetched exactly when a Brain would fetch them.

    Lightning creates a training iterator before training starts, may create it twice,
    prefetches if there is no length, and caches the length for the run. Each of these would
    use the random number generator, start workers or count batches at another time than
    SpeechBrain. Therefore ``iter()`` has no effect here. A pass over the data begins with
    the first batch after ``start()``.

    Args:
        loader: Loader that ``fit`` or ``evaluate`` got.
        batches: Returns an iterator over one pass of ``loader``.
    """

    def __init__(
        self, loader: Iterable[Any], batches: Callable[[Iterable[Any]], Iterator[Any]]
    ) -> None:
        self.loader = loader
        self._make_pass = batches
        self._pass: Iterator[Any] = iter(())
        self._ahead: Any = _NOTHING

    def __len__(self) -> int:
        """Returns the length for display. A pass ends when the loader is exhausted.

        The length is at least 1: Lightning skips a stage whose loader is empty, but
        SpeechBrain calls the hooks of the stage.

        Raises:
            TypeError: The loader has no length. Lightning then uses ``inf``.
        """
        length = self.known_length()
        if length is None:
            raise TypeError(f"{type(self.loader).__name__} has no length")
        return max(1, length)

    def known_length(self) -> int | None:
        """Returns the current length of the loader, or None if it has no length."""
        return length_of(self.loader)

    def start(self) -> None:
        """Starts a new pass. No batch is fetched yet."""
        self.close()
        self._pass = iter(self._make_pass(self.loader))

    def close(self) -> None:
        """Ends the pass, with the iterator and the workers of the loader."""
        old, self._pass = self._pass, iter(())
        self._ahead = _NOTHING
        if hasattr(old, "close"):
            old.close()

    def fetch(self) -> bool:
        """Fetches the next batch, unless a fetched batch is waiting.

        Returns:
            Whether there is a next batch.
        """
        if self._ahead is _NOTHING:
            self._ahead = next(self._pass, _NOTHING)
        return self._ahead is not _NOTHING

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch, self._ahead = self._ahead, _NOTHING
        return next(self._pass) if batch is _NOTHING else batch
