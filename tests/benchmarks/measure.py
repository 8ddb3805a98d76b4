"""How benchmarks measure: contestants that take turns, and some steps within a training."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

Result = TypeVar("Result")
Probe = AbstractContextManager[Any]


@contextlib.contextmanager
def quiet(threads: int | None = 1) -> Iterator[None]:
    """Nothing is logged or warned of; by default one thread, for the tensors are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
            torch.set_num_threads(before)


def interleaved(
    rounds: int, actions: Mapping[str, Callable[[], Result]]
) -> dict[str, list[Result]]:
    """The results of actions that take turns, every other round in reverse.

    What each of them prints is thrown away; nobody collects another one's garbage.
    """
    found: dict[str, list[Result]] = {name: [] for name in actions}
    for number in range(rounds):
        for name in list(actions)[:: -1 if number % 2 else 1]:
            gc.collect()
            with (
                contextlib.redirect_stderr(io.StringIO()),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                found[name].append(actions[name]())
    return found


def seconds(action: Callable[[], Any]) -> float:
    """How long an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def end_process() -> NoReturn:
    """Ends one of several processes, when all of them are done.

    Not as Python ends: a thread of gloo that wants the interpreter then aborts now and then.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


class Meter:
    """Measures steps of a training, from a call of its model to a later one.

    The start and the end of the fit are not in the figures.

    Args:
        steps: How many are measured.
        probes: What is entered before them, and left after them.
        warm: Steps before.
        training: Whether those of TRAIN are measured, or those of VALID.
    """

    def __init__(
        self, steps: int, *probes: Probe, warm: int = 5, training: bool = True
    ) -> None:
        self._probes, self._stack = probes, ExitStack()
        self._first, self._last = warm + 1, warm + 1 + steps
        self._training = training
        self._calls = 0

    @property
    def batches(self) -> int:
        """How many the training has to have, at least."""
        return self._last

    def watch(self, model: nn.Module) -> None:
        """Counts the calls of a model, one of which a step makes."""
        model.register_forward_pre_hook(self._called)

    def _called(self, model: nn.Module, _: object) -> None:
        if model.training is not self._training:
            return
        self._calls += 1
        if self._calls == self._first:
            for probe in self._probes:
                self._stack.enter_context(probe)
        elif self._calls == self._last:
            self._stack.close()


class Seconds:
    """A probe: how long it takes, with all that a GPU has yet to do.

    Attributes:
        taken: The seconds.
    """

    taken = 0.0

    def __enter__(self) -> Seconds:
        synchronize()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        synchronize()
        self.taken = time.perf_counter() - self._started


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class PeakMemory:
    """A probe: the most that tensors took on the GPU.

    Attributes:
        mebibytes: How much.
    """

    mebibytes = 0.0

    def __enter__(self) -> PeakMemory:
        torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: object) -> None:
        self.mebibytes = torch.cuda.max_memory_allocated() / 2**20


class Waits:
    """A probe: how often the host waits for the GPU.

    Counted are the operations that ``torch.cuda.set_sync_debug_mode`` warns of, and what it
    does not see: waits for an event, a stream or the whole device that Python code makes.

    Attributes:
        count: How often.
    """

    # ``torch.Event`` and ``torch.Stream`` are C types, which cannot be patched, so a subclass
    # takes their place.
    replaced = (torch, "Event"), (torch, "Stream")
    patched = (
        (torch.cuda.Event, "synchronize"), (torch.cuda.Stream, "synchronize"),
        (torch.cuda, "synchronize"),
    )  # fmt: skip

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Waits:
        self._stack = stack = ExitStack()
        for owner, name in self.replaced:
            self._set(owner, name, self._counting_type(getattr(owner, name)))
        for owner, name in self.patched:
            self._set(owner, name, self._counting(getattr(owner, name)))
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        stack.callback(lambda: self._add(caught or []))
        if torch.cuda.is_available():
            stack.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return function(*args, **kwargs)

        return counting

    def _counting_type(self, base: Any) -> type:
        return type(base.__name__, (base,), {"synchronize": self._counting(base.synchronize)})

    def _add(self, caught: list[warnings.WarningMessage]) -> None:
        self.count += sum("synchronizing CUDA operation" in str(w.message) for w in caught)
