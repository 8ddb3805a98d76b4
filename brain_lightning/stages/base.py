"""Base class of the stages of a run: what TRAIN, VALID and TEST share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from brain_lightning.data.dataloaders import length_of
from brain_lightning.phase import Phase
from brain_lightning.stage import Stage
from brain_lightning.temporary import TemporaryAttributes

from .loader import StageLoader
from .metrics import arguments_of, staged
from .progress import progress_bar

if TYPE_CHECKING:
    from .run import Run


class RunStage:
    """Stage of a run. It runs once, or once per epoch.

    Args:
        run: The run.

    Attributes:
        kind: Which stage it is.
        run: The run.
        brain: The Brain that runs.
        run_state: State of the run that is saved in checkpoints.
        brain_stage: ``kind`` as a member of the Brain's enumeration, because a recipe may
            compare with ``is``.
        loaders: The loaders, as the Trainer iterates them.
        set_names: Names of the datasets if there are several.
        by_recipe: Custom loop of the stage, if the recipe has one; else None.
    """

    kind: ClassVar[Stage]
    by_recipe: Callable[[], Any] | None = None

    def __init__(self, run: Run) -> None:
        self.run, self.brain, self.run_state = run, run.brain, run.run_state
        self.brain_stage: Any = run.brain._lightning.stage_type[self.kind.name]
        self.loaders: list[StageLoader] = []
        self.set_names: Sequence[str] = ("",)

    @property
    def phase_after(self) -> Phase:
        """Phase of the epoch after ``on_stage_end`` has ended the stage."""
        raise NotImplementedError

    @property
    def epoch(self) -> Any:
        """Number of the epoch; None in TEST."""
        return self.run.epochs.current

    def wrap(
        self, loaders: Sequence[Iterable[Any]], names: Sequence[str] = ("",)
    ) -> list[StageLoader]:
        """Wraps the loaders, so that the stage decides when a batch is fetched.

        Args:
            loaders: Loaders that the Trainer got for the stage.
            names: Names of the datasets if there are several.

        Returns:
            The loaders for the Trainer to iterate.
        """
        self.set_names = names
        self.loaders = [
            StageLoader(loader, functools.partial(self._batches, position=position))
            for position, loader in enumerate(loaders)
        ]
        return self.loaders

    def close(self) -> None:
        """Ends every pass over the data, with its worker processes and its bar."""
        for loader in self.loaders:
            loader.close()

    @contextmanager
    def written_by_recipe(self, loop: Callable[[], Any]) -> Iterator[None]:
        """Runs the stage by a custom loop of the recipe, which calls the hooks itself.

        Args:
            loop: Runs the custom loop.

        Yields:
            None
        """
        with TemporaryAttributes() as temporary:
            temporary.wrap(self.brain, "on_stage_end", self._on_stage_end)
            temporary.override(self, "by_recipe", loop)
            yield

    def _on_stage_end(self, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Records the loss and the end of the stage when the recipe calls ``on_stage_end``."""
        stage, loss, *_ = arguments_of(hook, args, kwargs).values()
        if stage is not self.brain_stage or self.run.current is not self:
            return hook(*args, **kwargs)
        self.run.metrics.add(self.kind, {"loss": loss})
        with self._ending():
            result = hook(*args, **kwargs)
        self.run.metrics.add(self.kind, {"loss": loss})
        return result

    def _ending(self) -> AbstractContextManager[None]:
        """Context in which the hook that ends the stage is called."""
        return self.run_state.entering(self.phase_after)

    def running_loss(self) -> dict[str, float]:
        """Returns the average loss so far by metric name; empty before the first batch."""
        return {staged(self.kind, "loss"): self._average()} if self.brain.step else {}

    def _is_debugged(self) -> bool:
        """Whether the stage has run ``debug_batches`` batches in debug mode."""
        return self.brain.debug and 0 < self.brain.debug_batches == self.brain.step

    def _average(self) -> float:
        raise NotImplementedError

    def _batches(self, loader: Iterable[Any], position: int) -> Iterator[Any]:
        """Yields the batches of one pass over the loader at index ``position``."""
        raise NotImplementedError

    def _iterate(self, loader: Iterable[Any], position: int) -> Iterator[Any]:
        """Returns an iterator over the loader."""
        return iter(loader)

    @contextmanager
    def _bar(self, loader: Iterable[Any], position: int) -> Iterator[Iterable[Any]]:
        """Shows a bar over one pass; leaving the context early also ends the workers."""
        with (
            closing(self._fetched(loader, position)) as batches,
            progress_bar(self, batches, length_of(loader)) as bar,
        ):
            yield bar

    def _fetched(self, loader: Iterable[Any], position: int) -> Generator[Any, None, None]:
        try:
            yield from self._iterate(loader, position)
        except Exception as error:
            self.run.locate(error, next_is="fetching batch")
            raise
