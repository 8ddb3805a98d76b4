"""One stage of a run: what TRAIN, VALID and TEST have in common."""

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
    """A stage of a run, which runs once or in each epoch.

    Args:
        run: The run.

    Attributes:
        kind: Which stage it is.
        run: The run.
        brain: The Brain that runs.
        run_state: What is saved of the run.
        brain_stage: ``kind`` in the Brain's own enumeration: a recipe may compare with ``is``.
        loaders: The loaders, as the Trainer iterates them.
        set_names: Of its sets, where there are several.
        by_recipe: The loop of the stage, where the recipe has written it itself.
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
        """What is done of the epoch once ``on_stage_end`` has ended the stage."""
        raise NotImplementedError

    @property
    def epoch(self) -> Any:
        """The number of the epoch; None in TEST."""
        return self.run.epochs.current

    def wrap(
        self, loaders: Sequence[Iterable[Any]], names: Sequence[str] = ("",)
    ) -> list[StageLoader]:
        """Puts the loaders under the control of the stage.

        Args:
            loaders: What the Trainer was given for the stage.
            names: Of the sets, where there are several.

        Returns:
            What the Trainer is to iterate.
        """
        self.set_names = names
        self.loaders = [
            StageLoader(loader, functools.partial(self._batches, position=position))
            for position, loader in enumerate(loaders)
        ]
        return self.loaders

    def close(self) -> None:
        """Ends every pass: no worker process and no bar is left behind."""
        for loader in self.loaders:
            loader.close()

    @contextmanager
    def written_by_recipe(self, loop: Callable[[], Any]) -> Iterator[None]:
        """Leaves the stage to a recipe that has written its loop, with its hooks, itself.

        Args:
            loop: Runs it.

        Yields:
            None
        """
        with TemporaryAttributes() as temporary:
            temporary.wrap(self.brain, "on_stage_end", self._on_stage_end)
            temporary.override(self, "by_recipe", loop)
            yield

    def _on_stage_end(self, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``on_stage_end`` that the recipe calls: what the stage has found, and its end."""
        stage, loss, *_ = arguments_of(hook, args, kwargs).values()
        if stage is not self.brain_stage or self.run.current is not self:
            return hook(*args, **kwargs)
        self.run.metrics.add(self.kind, {"loss": loss})
        with self._ending():
            result = hook(*args, **kwargs)
        self.run.metrics.add(self.kind, {"loss": loss})
        return result

    def _ending(self) -> AbstractContextManager[None]:
        """The hook that ends the stage."""
        return self.run_state.entering(self.phase_after)

    def running_loss(self) -> dict[str, float]:
        """The average loss so far by its metric's name; nothing before the first batch."""
        return {staged(self.kind, "loss"): self._average()} if self.brain.step else {}

    def _is_debugged(self) -> bool:
        """Whether there were as many batches as ``debug_batches`` allows."""
        return self.brain.debug and 0 < self.brain.debug_batches == self.brain.step

    def _average(self) -> float:
        raise NotImplementedError

    def _batches(self, loader: Iterable[Any], position: int) -> Iterator[Any]:
        """One pass over the loader at a position among the others."""
        raise NotImplementedError

    def _iterate(self, loader: Iterable[Any], position: int) -> Iterator[Any]:
        """Begins to iterate the loader."""
        return iter(loader)

    @contextmanager
    def _bar(self, loader: Iterable[Any], position: int) -> Iterator[Iterable[Any]]:
        """One pass over the loader, with a bar; left early, it ends with its workers."""
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
