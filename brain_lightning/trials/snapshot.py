"""A snapshot of everything that hangs on a Brain, which is restored in place.

What ``checkpoints`` saves is what a run needs in another process: a part. A trial in the same
process changes more: counters, metrics, annealings, samplers, momentum, buffers. So every
object that can be reached from the Brain is kept as it is, one level deep, and all levels are
restored: the same objects, with the same content (Gamma et al., Design Patterns: Memento).
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

from .kept import Kept, Restore, keep_attributes, keep_class, keeper_of

# They hold no state, or none that a batch changes.
ATOMS = (
    type(None), bool, int, float, complex, str, bytes, Enum, PurePath, types.ModuleType,
    types.BuiltinFunctionType, torch.dtype, torch.device, weakref.ref, *weakref.ProxyTypes,
)  # fmt: skip
CONTAINERS = (dict, list, tuple, set, frozenset, deque)
# What runs a Brain, and not what is run.
OUTSIDE = (Run, RunStage, RunProgress, ExitStack)
# Of those who look on, or hold what cannot be copied: files, threads, processes.
OUTSIDE_MODULES = (
    "lightning", "pytorch_lightning", "logging", "threading", "concurrent",
    "multiprocessing", "subprocess", "tqdm", "tensorboard", "torch.distributed",
    "torch.utils.tensorboard", "torch._dynamo", "torch._inductor",
)  # fmt: skip
# What has more entries is the data of a dataset, and read; the rest of it may change.
DATA = 1000


class Snapshot:
    """The state of everything that can be reached, and of the process's random generators.

    Tensors are copied to the CPU: there is no room for a second model on a GPU, and the copy
    must not count among what is measured there.

    Args:
        *roots: Where to begin, such as a Brain.
    """

    def __init__(self, *roots: Any) -> None:
        self._random = random_state()
        # Their ids must not be given to others.
        self._seen: dict[int, Any] = {}
        self._restores: list[Restore] = []
        self._datasets: dict[int, Any] = {}
        with _no_garbage_collection():
            self._keep_all(roots, within_data=False)
            self._keep_all(self._datasets.values(), within_data=True)

    @property
    def objects(self) -> Iterable[Any]:
        """Everything that was reached and may hold something."""
        return self._seen.values()

    def restore(self) -> None:
        """Restores all of it, whatever fails in a part; objects that are new are forgotten."""
        with _no_garbage_collection(), ExitStack() as restores:
            restores.callback(set_random_state, self._random)
            for restore in reversed(self._restores):
                restores.callback(restore)

    def _keep_all(self, roots: Iterable[Any], within_data: bool) -> None:
        pending = deque(roots)
        while pending:
            obj = pending.popleft()
            is_class = issubclass(type(obj), type)
            cls: Any = obj if is_class else type(obj)
            keepers = _keepers(cls)
            if not keepers or id(obj) in self._seen or self._is_data(obj, within_data):
                continue
            self._seen[id(obj)] = obj
            for keep in (keep_class,) if is_class else keepers:
                restores, held = keep(obj)
                self._restores += restores
                pending.extend(held)

    def _is_data(self, obj: Any, within: bool) -> bool:
        """Whether it is the data of a dataset, or a dataset, of which the rest comes last."""
        if within:
            return _is_large(obj)
        if issubclass(type(obj), DataLoader):
            self._datasets[id(obj.dataset)] = obj.dataset
        if issubclass(type(obj), Dataset):
            self._datasets[id(obj)] = obj
        return id(obj) in self._datasets


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """For a million objects, which all stay, it would take most of the time."""
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
def _keepers(cls: Any) -> tuple[Callable[[Any], Kept], ...]:
    """What keeps objects of a class; nothing for those that hold nothing, or look on."""
    if issubclass(cls, ATOMS) or _is_outside(cls):
        return ()
    own = keeper_of(cls)
    return (keep_attributes,) if own is None else (own, keep_attributes)


def _is_outside(cls: type) -> bool:
    if issubclass(cls, (Tensor, nn.Module, Optimizer)):
        return False
    return issubclass(cls, OUTSIDE) or any(
        f"{base.__module__}.".startswith(f"{outside}.")
        for base in cls.__mro__
        for outside in OUTSIDE_MODULES
    )
