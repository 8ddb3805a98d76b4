"""Records which callback hooks were called before a save; calls missing ones on resume."""

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

# Hooks that are called once per epoch.
EPOCH_HOOKS = ("on_train_epoch_start", "on_train_epoch_end")
# Hooks that are called after a batch.
BATCH_HOOKS = ("on_train_batch_end", "on_validation_end")

# These callbacks set up something in on_train_epoch_start that ends with the process.
NEEDED_IN_EACH_PROCESS = (
    ProgressBar, GradientAccumulationScheduler, StochasticWeightAveraging,
)  # fmt: skip

# Hooks that callbacks may have missed when an epoch resumes in a given phase.
MISSING_HOOKS: dict[Phase | None, tuple[str, ...]] = {
    Phase.FITTED: ("on_train_batch_end",),
    Phase.VALIDATED: ("on_validation_end",),
    Phase.VALID_OVER: ("on_train_epoch_start", "on_validation_end", "on_train_epoch_end"),
}

# The name of a hook, and the epoch (or the epoch and the batch) in which it is called.
Call = tuple[str, tuple[int, ...]]


class CalledHooks:
    """The callbacks whose hooks were called in the current epoch, or after the current batch.

    A checkpoint may be saved after some callbacks were called at the end of a batch or an
    epoch, and before others were called, for example EarlyStopping. When the run is resumed:

    - The missing hooks of callbacks with a state are called. Hooks that were called before
      the save are not called again.
    - Callbacks without a state restart. If they override ``on_train_epoch_end``, their
      ``on_train_epoch_start`` is called again. Their missing hooks are not called.

    Args:
        trainer: The Trainer in ``fit``.
        run: The run.
    """

    def __init__(self, trainer: Trainer, run: Run) -> None:
        self._trainer = trainer
        self._run = run
        self._called: dict[str, tuple[tuple[int, ...], set[str]]] = {}
        # For each hook, the callbacks with a state that override it.
        self._with_state: dict[str, list[str]] = {}
        # The callbacks that were called before the save. Each is looked up only once.
        self._called_before: dict[Call, set[str]] = {}
        self._looked_up: set[tuple[Call, str]] = set()
        self._missing: set[Call] = set()
        self._metrics: Collection[str] = ()

    def watch(self, callbacks: Sequence[Callback], temporary: TemporaryAttributes) -> None:
        """Records calls of callback hooks, until ``temporary`` is restored.

        Args:
            callbacks: The callbacks of the Trainer, except for ``BrainCallback``.
            temporary: Records the changes to the callbacks.
        """
        for hook in (*EPOCH_HOOKS, *BATCH_HOOKS):
            overriding = [(k, each) for k, each in _named(callbacks) if has_hook(each, hook)]
            self._with_state[hook] = [key for key, each in overriding if has_state(each)]
            for key, callback in overriding:
                temporary.override(callback, hook, _RecordedHook(self, key, callback, hook))

    def called(self, hook: str) -> set[str]:
        """Returns the keys of the callbacks whose hook was called in this epoch or batch.

        Args:
            hook: The name of the hook.
        """
        now = self._now(hook)
        if self._called.get(hook, ((), set()))[0] != now:
            self._called[hook] = (now, set())
        return self._called[hook][1]

    def is_incomplete(self, hook: str) -> bool:
        """Whether the hook of some callback with a state was not called yet.

        Args:
            hook: The name of the hook.
        """
        return not self.called(hook).issuperset(self._with_state.get(hook, ()))

    def skips(self, hook: str, key: str, callback: Callback) -> bool:
        """Whether to skip a hook of a callback, in an epoch that was resumed.

        Args:
            hook: The name of the hook.
            key: The key of the callback.
            callback: The callback.
        """
        call = (hook, self._now(hook))
        if call not in self._called_before or (call, key) in self._looked_up:
            return False
        self._looked_up.add((call, key))
        if key in self._called_before[call]:
            return hook != "on_train_epoch_start" or not _restarts(callback)
        return call in self._missing and not self._can_call_on_resume(callback)

    def _can_call_on_resume(self, callback: Callback) -> bool:
        monitor = getattr(callback, "monitor", None)
        if not has_state(callback) or monitor in (None, *self._metrics):
            return has_state(callback)
        logger.warning(
            "The checkpoint was saved before %r was reported. %s is not called at the end of "
            "epoch %s.",
            monitor,
            type(callback).__name__,
            self._run.epochs.current,
        )
        return False

    def state(self) -> State:
        """Returns the recorded calls as plain values."""
        return {hook: [list(now), sorted(keys)] for hook, (now, keys) in self._called.items()}

    def restore(self, state: State, metrics: Collection[str]) -> None:
        """Restores the recorded calls, after the Trainer's counters were restored.

        Args:
            state: Return value of ``state``.
            metrics: The names of the metrics that were reported in the epoch.
        """
        phase, self._metrics = self._run.run_state.resumed_phase, metrics
        self._called = {hook: (tuple(now), set(keys)) for hook, (now, keys) in state.items()}
        self._called_before = {
            (hook, now): set(keys) for hook, (now, keys) in self._called.items()
        }
        for hook in MISSING_HOOKS.get(phase, ()):
            epoch, *batches = self._now(hook)
            # A batch that was already fitted is counted only when its hooks are called.
            call = (hook, (epoch, *(n + (phase is Phase.FITTED) for n in batches)))
            self._missing.add(call)
            self._called_before.setdefault(call, set())

    def _now(self, hook: str) -> tuple[int, ...]:
        epoch, train = self._trainer.current_epoch, self._run.train
        return (epoch,) if hook in EPOCH_HOOKS else (epoch, train.fitted_batches)


def has_state(callback: Callback) -> bool:
    """Whether a callback has a state that is saved and restored.

    Args:
        callback: The callback.
    """
    return has_hook(callback, "state_dict") or has_hook(callback, "on_save_checkpoint")


def _restarts(callback: Callback) -> bool:
    if isinstance(callback, NEEDED_IN_EACH_PROCESS):
        return True
    # For example a callback that measures the time of an epoch, or an average over it.
    return not has_state(callback) and has_hook(callback, "on_train_epoch_end")


class _RecordedHook:
    """A hook of a callback that records that it was called."""

    def __init__(
        self, called_hooks: CalledHooks, key: str, callback: Callback, hook: str
    ) -> None:
        self._called_hooks, self._key = called_hooks, key
        self._callback, self._hook = callback, hook
        self._method = getattr(callback, hook)
        functools.update_wrapper(self, self._method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        called = self._called_hooks.called(self._hook)
        # A save within the hook counts the hook as called. A hook that fails is called again.
        called.add(self._key)
        if self._called_hooks.skips(self._hook, self._key, self._callback):
            return None
        try:
            return self._method(*args, **kwargs)
        except BaseException:
            called.discard(self._key)
            raise

    def __reduce__(self) -> Any:
        """Pickles as the method itself, so that hooks of a copy are not recorded."""
        return getattr, (self._callback, self._hook)


def _named(callbacks: Sequence[Callback]) -> Iterator[tuple[str, Callback]]:
    """Yields each callback with a key that is the same in every process."""
    seen: Counter[str] = Counter()
    for callback in callbacks:
        key = callback.state_key
        yield (f"{key} {seen[key]}" if seen[key] else key), callback
        seen[key] += 1
