"""A snapshot of everything that hangs on a Brain, which is restored in place.

What ``checkpoints`` saves is what a run needs in another process: a part. A trial in the same
process changes more: counters, metrics, annealings, samplers, momentum, buffers. So every
object that can be reached from the Brain is kept as it is, one level deep, and all levels are
restored: the same objects, with the same content (Gamma et al., Design Patterns: Memento).
"""

from __future__ import annotations

import random
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from enum import Enum
from functools import cache, partial
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from brain_lightning.fsdp2.tensors import local
from brain_lightning.resume.random_state import random_state, set_random_state
from brain_lightning.resume.run_progress import RunProgress
from brain_lightning.stages.base import RunStage
from brain_lightning.stages.run import Run

Restore = Callable[[], None]

# They hold no state, or none that a batch changes.
ATOMS = (
    type(None), bool, int, float, complex, str, bytes, type, Enum, PurePath, types.ModuleType,
    types.FunctionType, types.BuiltinFunctionType, torch.dtype, torch.device,
)  # fmt: skip
# What runs a Brain, and not what is run; a dataset is large, and read.
OUTSIDE = (Run, RunStage, RunProgress, ExitStack, Dataset)
# Of those who look on, or hold what cannot be copied: files, threads, processes.
OUTSIDE_MODULES = (
    "lightning", "pytorch_lightning", "logging", "threading", "concurrent",
    "multiprocessing", "subprocess", "tqdm", "tensorboard", "torch.distributed",
    "torch.utils.tensorboard", "torch._dynamo", "torch._inductor", "weakref",
)  # fmt: skip


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
        pending = deque(roots)
        while pending:
            obj = pending.popleft()
            if not isinstance(obj, ATOMS) and id(obj) not in self._seen:
                self._seen[id(obj)] = obj
                pending.extend(self._keep(obj))

    def restore(self) -> None:
        """Restores all of it; objects that are new are forgotten."""
        for restore in self._restores:
            restore()
        set_random_state(self._random)

    def _keep(self, obj: Any) -> Iterable[Any]:
        """Keeps one object; returns what it holds."""
        if isinstance(obj, Tensor):
            return self._keep_tensor(obj)
        if isinstance(obj, types.MethodType):
            return (obj.__self__,)
        if isinstance(obj, partial):
            return (obj.func, *obj.args, *obj.keywords.values())
        if isinstance(obj, (tuple, frozenset)):
            return obj
        if (restore := _restore_of_generator(obj)) is not None:
            self._restores.append(restore)
            return ()
        return (
            () if _is_outside(obj) else [*self._keep_items(obj), *self._keep_attributes(obj)]
        )

    def _keep_tensor(self, tensor: Tensor) -> Iterable[Any]:
        if not tensor.is_meta:
            here = local(tensor.detach())
            copy = here.to("cpu", copy=True)
            self._restores.append(lambda: _restore_tensor(tensor, copy))
        if not tensor.is_leaf:
            return ()
        gradient, requires = tensor.grad, tensor.requires_grad
        self._restores.append(lambda: _restore_gradient(tensor, gradient, requires))
        return () if gradient is None else (gradient,)

    def _keep_items(self, obj: Any) -> Iterator[Any]:
        if isinstance(obj, dict):
            items = list(dict.items(obj))
            self._restores.append(lambda: _restore_dict(obj, items))
            for key, value in items:
                yield key
                yield value
        elif isinstance(obj, (list, deque)):
            content = list(obj)
            self._restores.append(lambda: _restore_sequence(obj, content))
            yield from content
        elif isinstance(obj, (set, bytearray)):
            content_of_set = obj.copy()
            self._restores.append(lambda: _restore_set(obj, content_of_set))
        elif isinstance(obj, np.ndarray) and obj.flags.writeable:
            array = obj.copy()
            self._restores.append(lambda: np.copyto(obj, array))

    def _keep_attributes(self, obj: Any) -> Iterator[Any]:
        own = getattr(obj, "__dict__", None)
        if isinstance(own, dict):
            yield own
        for name in _slots(obj.__class__):
            if hasattr(obj, name):
                value = getattr(obj, name)
                self._restores.append(partial(object.__setattr__, obj, name, value))
                yield value


@cache
def _slots(cls: Any) -> tuple[str, ...]:
    """The attributes that objects of a class have beside ``__dict__``, if they are set."""
    found = (vars(base).get("__slots__", ()) for base in cls.__mro__)
    names = (slots if not isinstance(slots, str) else (slots,) for slots in found)
    return tuple(
        name
        for each in names
        for name in each
        if isinstance(getattr(cls, name, None), types.MemberDescriptorType)
    )


def _is_outside(obj: Any) -> bool:
    return not isinstance(obj, nn.Module) and (
        isinstance(obj, OUTSIDE) or _is_class_outside(obj.__class__)
    )


@cache
def _is_class_outside(cls: Any) -> bool:
    modules = [base.__module__ for base in cls.__mro__]
    return any(
        module == outside or module.startswith(f"{outside}.")
        for module in modules
        for outside in OUTSIDE_MODULES
    )


def _restore_of_generator(obj: Any) -> Restore | None:
    if isinstance(obj, torch.Generator):
        return partial(_restore_torch_generator, obj, obj.get_state())
    if isinstance(obj, random.Random):
        return partial(obj.setstate, obj.getstate())
    if isinstance(obj, np.random.RandomState):
        return partial(obj.set_state, obj.get_state())
    if isinstance(obj, np.random.Generator):
        return partial(setattr, obj.bit_generator, "state", obj.bit_generator.state)
    return None


def _restore_torch_generator(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


@torch.no_grad()
def _restore_tensor(tensor: Tensor, copy: Tensor) -> None:
    here = local(tensor.detach())
    if here.shape == copy.shape and here.dtype == copy.dtype and not here.is_sparse:
        here.copy_(copy)
    else:
        # Somebody has given it other data.
        tensor.data = copy.to(tensor.device)


def _restore_gradient(tensor: Tensor, gradient: Tensor | None, requires: bool) -> None:
    if tensor.grad is not gradient:
        tensor.grad = gradient
    if tensor.is_leaf and tensor.requires_grad != requires:
        tensor.requires_grad_(requires)


def _restore_dict(obj: dict[Any, Any], items: list[tuple[Any, Any]]) -> None:
    now = list(dict.items(obj))
    if len(now) == len(items) and all(
        a[0] is b[0] and a[1] is b[1] for a, b in zip(now, items, strict=True)
    ):
        return
    # The methods of an OrderedDict keep its order; a subclass may have others of its own.
    cls: Any = next(
        c for c in type(obj).__mro__ if c.__module__ in ("builtins", "collections")
    )
    cls.clear(obj)
    for key, value in items:
        cls.__setitem__(obj, key, value)


def _restore_sequence(obj: Any, content: list[Any]) -> None:
    if len(obj) == len(content) and all(a is b for a, b in zip(obj, content, strict=True)):
        return
    obj.clear()
    obj.extend(content)


def _restore_set(obj: Any, content: Any) -> None:
    obj.clear()
    obj.extend(content) if isinstance(obj, bytearray) else obj.update(content)
