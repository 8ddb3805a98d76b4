"""Which callbacks have heard what: a resumed run tells each of them once."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ProgressBar

from brain_lightning.lightning_internals.trainer_callbacks import has_hook
from brain_lightning.resume.plain_values import State
from brain_lightning.stages.run import Run
from brain_lightning.temporary import TemporaryAttributes

OF_AN_EPOCH = ("on_train_epoch_start", "on_train_epoch_end")
OF_A_BATCH = ("on_train_batch_end", "on_validation_end")

# They change what ends with the process.
OF_A_PROCESS = (ProgressBar, GradientAccumulationScheduler)


class Told:
    """The callbacks that have heard a hook in the epoch, or after the batch, of now.

    A checkpoint may be saved when some callbacks have heard that an epoch or a batch is
    over, and others not, EarlyStopping say. When the run is resumed, the latter hear of it.

    Args:
        trainer: The Trainer in ``fit``.
        run: The run.
    """

    def __init__(self, trainer: Trainer, run: Run) -> None:
        self._trainer = trainer
        self._run = run
        self._told: dict[str, tuple[tuple[int, ...], set[str]]] = {}
        self._watched: dict[str, list[str]] = {}

    def watch(self, callbacks: Sequence[Callback], temporary: TemporaryAttributes) -> None:
        """Records what callbacks hear, until ``temporary`` is restored.

        Args:
            callbacks: Those of the Trainer, without our own.
            temporary: Records what is changed on them.
        """
        for hook in (*OF_AN_EPOCH, *OF_A_BATCH):
            hearing = [
                (key, callback)
                for key, callback in _named(callbacks)
                if has_hook(callback, hook) and not isinstance(callback, OF_A_PROCESS)
            ]
            self._watched[hook] = [key for key, _ in hearing]
            for key, callback in hearing:
                temporary.override(callback, hook, _Once(self, key, callback, hook))

    def heard(self, hook: str) -> set[str]:
        """Those that have heard a hook in the epoch, or after the batch, of now.

        Args:
            hook: Its name.
        """
        now = self._now(hook)
        if self._told.get(hook, ((), set()))[0] != now:
            self._told[hook] = (now, set())
        return self._told[hook][1]

    def is_telling(self, hook: str) -> bool:
        """Whether some callback has not heard a hook.

        Args:
            hook: Its name.
        """
        now, told = self._told.get(hook, ((), set()))
        heard = told if now == self._now(hook) else set()
        return not heard.issuperset(self._watched.get(hook, ()))

    def state(self) -> State:
        """Who has heard what, as plain values."""
        return {hook: [list(now), sorted(keys)] for hook, (now, keys) in self._told.items()}

    def restore(self, state: State) -> None:
        """Restores who has heard what.

        Args:
            state: From ``state``.
        """
        self._told = {hook: (tuple(now), set(keys)) for hook, (now, keys) in state.items()}

    def _now(self, hook: str) -> tuple[int, ...]:
        epoch, train = self._trainer.current_epoch, self._run.train
        return (epoch,) if hook in OF_AN_EPOCH else (epoch, train.fitted_batches)


class _Once:
    """A hook of a callback that is called where it has not been heard yet."""

    def __init__(self, told: Told, key: str, callback: Callback, hook: str) -> None:
        self._told, self._key = told, key
        self._callback, self._hook = callback, hook
        self._method = getattr(callback, hook)
        functools.update_wrapper(self, self._method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        told = self._told.heard(self._hook)
        if self._key in told:
            return None
        # For what it saves itself, it is done; where it fails, it hears again.
        told.add(self._key)
        try:
            return self._method(*args, **kwargs)
        except BaseException:
            told.discard(self._key)
            raise

    def __reduce__(self) -> Any:
        """Pickles as the method itself: a copy is told everything."""
        return getattr, (self._callback, self._hook)


def _named(callbacks: Sequence[Callback]) -> Iterator[tuple[str, Callback]]:
    """Callbacks with names that are the same in another process."""
    seen: Counter[str] = Counter()
    for callback in callbacks:
        key = callback.state_key
        yield (f"{key} {seen[key]}" if seen[key] else key), callback
        seen[key] += 1
