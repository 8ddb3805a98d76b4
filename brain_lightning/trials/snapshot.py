"""Takes a snapshot of everything reachable from a Brain, and restores it in place.

A checkpoint holds only what a run needs in another process. A trial in the same process
changes more: counters, metrics, annealings, samplers, momentum, buffers. The snapshot
therefore visits every object that is reachable from the Brain, and captures the state of each
one. Restoring it gives the same objects the same content again (Gamma et al., Design Patterns:
Memento).
"""

from __future__ import annotations

import gc
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from functools import cache
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from brain_lightning.resume.random_state import random_state, set_random_state
from brain_lightning.resume.run_progress import RunProgress
from brain_lightning.stages.base import RunStage
from brain_lightning.stages.run import Run

from .object_state import (
    Captured,
    Restore,
    capture_attributes,
    capture_class,
    capture_function_of,
)

# Types without state, or without state that a batch changes.
ATOMS = (
    type(None), bool, int, float, complex, str, bytes, Enum, PurePath, types.ModuleType,
    types.BuiltinFunctionType, torch.dtype, torch.device, weakref.ref, *weakref.ProxyTypes,
)  # fmt: skip
CONTAINERS = (dict, list, tuple, set, frozenset, deque)
# Objects that run the Brain. They are not part of its state.
OUTSIDE = (Run, RunStage, RunProgress, ExitStack)
# Modules whose objects only observe a run, or hold files, threads or processes.
OUTSIDE_MODULES = (
    "lightning", "pytorch_lightning", "logging", "threading", "concurrent",
    "multiprocessing", "subprocess", "tqdm", "tensorboard", "torch.distributed",
    "torch.utils.tensorboard", "torch._dynamo", "torch._inductor",
)  # fmt: skip
# Larger containers and tensors of a dataset are its data, which a trial only reads.
DATA = 1000


class Snapshot:
    """The state of all reachable objects and of the global random number generators.

    Tensors are copied to the CPU, because a GPU may have no memory for a second copy of the
    model, and because copies must not count in memory measurements.

    Args:
        *roots: Objects from which the traversal starts, such as a Brain.
    """

    def __init__(self, *roots: Any) -> None:
        self._random = random_state()
        # Stores the objects, so that their ids stay in use.
        self._seen: dict[int, Any] = {}
        self._restores: list[Restore] = []
        self._datasets: dict[int, Any] = {}
        with _no_garbage_collection():
            self._capture_all(roots, within_data=False)
            self._capture_all(self._datasets.values(), within_data=True)

    @property
    def objects(self) -> Iterable[Any]:
        """All objects that were captured."""
        return self._seen.values()

    def restore(self) -> None:
        """Restores all objects, even if restoring one of them fails."""
        with _no_garbage_collection(), ExitStack() as restores:
            restores.callback(set_random_state, self._random)
            for restore in reversed(self._restores):
                restores.callback(restore)

    def _capture_all(self, roots: Iterable[Any], within_data: bool) -> None:
        pending = deque(roots)
        while pending:
            obj = pending.popleft()
            is_class = issubclass(type(obj), type)
            cls: Any = obj if is_class else type(obj)
            functions = _capture_functions(cls)
            if not functions or id(obj) in self._seen or self._is_data(obj, within_data):
                continue
            self._seen[id(obj)] = obj
            for capture in (capture_class,) if is_class else functions:
                restores, held = capture(obj)
                self._restores += restores
                pending.extend(held)

    def _is_data(self, obj: Any, within: bool) -> bool:
        """Returns whether to skip an object for now: a dataset, or large data in a dataset."""
        if within:
            return _is_large(obj)
        if issubclass(type(obj), DataLoader):
            self._datasets[id(obj.dataset)] = obj.dataset
        if issubclass(type(obj), Dataset):
            self._datasets[id(obj)] = obj
        return id(obj) in self._datasets


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disables garbage collection, which takes most of the time if there are many objects."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _is_large(obj: Any) -> bool:
    cls = type(obj)
    if issubclass(cls, Tensor):
        return not is_lazy(obj) and obj.numel() > DATA
    if issubclass(cls, np.ndarray):
        return bool(obj.size > DATA)
    container: Any = next((each for each in CONTAINERS if issubclass(cls, each)), None)
    return container is not None and container.__len__(obj) > DATA


@cache
def _capture_functions(cls: Any) -> tuple[Callable[[Any], Captured], ...]:
    """Returns the functions that capture objects of a class; none if it is not captured."""
    if issubclass(cls, ATOMS) or _is_outside(cls):
        return ()
    own = capture_function_of(cls)
    return (capture_attributes,) if own is None else (own, capture_attributes)


def _is_outside(cls: type) -> bool:
    if issubclass(cls, (Tensor, nn.Module, Optimizer)):
        return False
    return issubclass(cls, OUTSIDE) or any(
        f"{base.__module__}.".startswith(f"{outside}.")
        for base in cls.__mro__
        for outside in OUTSIDE_MODULES
    )
