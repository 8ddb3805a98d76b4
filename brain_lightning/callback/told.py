"""Which callbacks have heard what: a resumed run makes up for what they have not."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ProgressBar,
    StochasticWeightAveraging,
)

from brain_lightning.lightning_internals.trainer_callbacks import has_hook
from brain_lightning.phase import Phase
from brain_lightning.resume.plain_values import State
from brain_lightning.stages.run import Run
from brain_lightning.temporary import TemporaryAttributes

logger = logging.getLogger(__name__)

OF_AN_EPOCH = ("on_train_epoch_start", "on_train_epoch_end")
OF_A_BATCH = ("on_train_batch_end", "on_validation_end")

# What they make when an epoch starts ends with the process.
OF_A_PROCESS = (ProgressBar, GradientAccumulationScheduler, StochasticWeightAveraging)

# Of an epoch that resumes in a phase, what callbacks may have missed.
MADE_UP: dict[Phase | None, tuple[str, ...]] = {
    Phase.FITTED: ("on_train_batch_end",),
    Phase.VALIDATED: ("on_validation_end",),
    Phase.VALID_OVER: ("on_train_epoch_start", "on_validation_end", "on_train_epoch_end"),
}

# A hook in an epoch, or after a batch.
Moment = tuple[str, tuple[int, ...]]


class Told:
    """The callbacks that have heard a hook in the epoch, or after the batch, of now.

    A checkpoint may be saved when some callbacks have heard that an epoch or a batch is
    over, and others not, EarlyStopping say. When the run is resumed, those that keep a state
    hear of it; what they had heard, they do not hear again. Those without a state begin anew:
    they hear the start of the epoch again if they hear its end as well, and nothing of what
    was over.

    Args:
        trainer: The Trainer in ``fit``.
        run: The run.
    """

    def __init__(self, trainer: Trainer, run: Run) -> None:
        self._trainer = trainer
        self._run = run
        self._heard: dict[str, tuple[tuple[int, ...], set[str]]] = {}
        # Those that keep a state, by the hooks that they have.
        self._watched: dict[str, list[str]] = {}
        # Who had heard what before the run was resumed; each is looked up once.
        self._before: dict[Moment, set[str]] = {}
        self._looked_up: set[tuple[Moment, str]] = set()
        self._made_up: set[Moment] = set()
        self._metrics: Collection[str] = ()

    def watch(self, callbacks: Sequence[Callback], temporary: TemporaryAttributes) -> None:
        """Records what callbacks hear, until ``temporary`` is restored.

        Args:
            callbacks: Those of the Trainer, without our own.
            temporary: Records what is changed on them.
        """
        for hook in (*OF_AN_EPOCH, *OF_A_BATCH):
            hearing = [(k, each) for k, each in _named(callbacks) if has_hook(each, hook)]
            self._watched[hook] = [key for key, each in hearing if keeps_state(each)]
            for key, callback in hearing:
                temporary.override(callback, hook, _Recorded(self, key, callback, hook))

    def heard(self, hook: str) -> set[str]:
        """Those that have heard a hook in the epoch, or after the batch, of now.

        Args:
            hook: Its name.
        """
        now = self._now(hook)
        if self._heard.get(hook, ((), set()))[0] != now:
            self._heard[hook] = (now, set())
        return self._heard[hook][1]

    def is_telling(self, hook: str) -> bool:
        """Whether some callback that keeps a state has not heard a hook.

        Args:
            hook: Its name.
        """
        return not self.heard(hook).issuperset(self._watched.get(hook, ()))

    def skips(self, hook: str, key: str, callback: Callback) -> bool:
        """Whether a callback is not to hear a hook, in an epoch that was resumed.

        Args:
            hook: Its name.
            key: The name of the callback.
            callback: The callback.
        """
        moment = (hook, self._now(hook))
        if moment not in self._before or (moment, key) in self._looked_up:
            return False
        self._looked_up.add((moment, key))
        if key in self._before[moment]:
            return hook != "on_train_epoch_start" or not _begins_anew(callback)
        return moment in self._made_up and not self._can_make_up(callback)

    def _can_make_up(self, callback: Callback) -> bool:
        monitor = getattr(callback, "monitor", None)
        if not keeps_state(callback) or monitor in (None, *self._metrics):
            return keeps_state(callback)
        logger.warning(
            "The checkpoint was saved before %r was reported: what %s does with it at the end "
            "of epoch %s is left out.",
            monitor,
            type(callback).__name__,
            self._run.epochs.current,
        )
        return False

    def state(self) -> State:
        """Who has heard what, as plain values."""
        return {hook: [list(now), sorted(keys)] for hook, (now, keys) in self._heard.items()}

    def restore(self, state: State, metrics: Collection[str]) -> None:
        """Restores who has heard what, once the Trainer has its counts.

        Args:
            state: From ``state``.
            metrics: The names of what the epoch had reported.
        """
        phase, self._metrics = self._run.run_state.resumed_phase, metrics
        self._heard = {hook: (tuple(now), set(keys)) for hook, (now, keys) in state.items()}
        self._before = {(hook, now): set(keys) for hook, (now, keys) in self._heard.items()}
        for hook in MADE_UP.get(phase, ()):
            epoch, *batches = self._now(hook)
            # The batch in hand is counted when it is taken up.
            moment = (hook, (epoch, *(n + (phase is Phase.FITTED) for n in batches)))
            self._made_up.add(moment)
            self._before.setdefault(moment, set())

    def _now(self, hook: str) -> tuple[int, ...]:
        epoch, train = self._trainer.current_epoch, self._run.train
        return (epoch,) if hook in OF_AN_EPOCH else (epoch, train.fitted_batches)


def keeps_state(callback: Callback) -> bool:
    """Whether a callback has a state that is saved and restored.

    Args:
        callback: The callback.
    """
    return has_hook(callback, "state_dict") or has_hook(callback, "on_save_checkpoint")


def _begins_anew(callback: Callback) -> bool:
    if isinstance(callback, OF_A_PROCESS):
        return True
    # Such as one that takes the time, or the average, of an epoch.
    return not keeps_state(callback) and has_hook(callback, "on_train_epoch_end")


class _Recorded:
    """A hook of a callback that records who has heard it."""

    def __init__(self, told: Told, key: str, callback: Callback, hook: str) -> None:
        self._told, self._key = told, key
        self._callback, self._hook = callback, hook
        self._method = getattr(callback, hook)
        functools.update_wrapper(self, self._method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        heard = self._told.heard(self._hook)
        # For what it saves itself, it is done; where it fails, it hears again.
        heard.add(self._key)
        if self._told.skips(self._hook, self._key, self._callback):
            return None
        try:
            return self._method(*args, **kwargs)
        except BaseException:
            heard.discard(self._key)
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
