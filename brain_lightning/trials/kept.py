"""What is kept of one object, one level deep, by the kind that it is of.

A function gets the object, and returns what restores it and what it holds. Nothing is asked of
a class of the user's that it may have its own answer to: ``len``, ``==``, ``items``.
"""

from __future__ import annotations

import array
import logging
import random
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from brain_lightning.fsdp2.tensors import is_shard, local

Restore = Callable[[], None]
Kept = tuple[list[Restore], Iterable[Any]]

logger = logging.getLogger(__name__)

# Nothing is there.
_UNSET = object()


def keep_attributes(obj: Any) -> Kept:
    """Its class, ``__dict__`` and ``__slots__``.

    Args:
        obj: Any object; the parts of a shard are fsdp2's.
    """
    restores: list[Restore] = []
    held: list[Any] = []
    cls: Any = type(obj)
    if issubclass(cls, Tensor) and is_shard(obj):
        return restores, held
    if cls.__flags__ & _MADE_BY_PYTHON:
        # A lazy or parametrized module gets another one.
        restores.append(partial(_restore_class, obj, cls))
        held.append(cls)
    attributes, slots = _descriptors(cls)
    if attributes is not None:
        held.append(attributes.__get__(obj))
    for slot in slots:
        try:
            value = slot.__get__(obj)
        except AttributeError:
            value = _UNSET
        else:
            held.append(value)
        restores.append(partial(_restore_slot, slot, obj, value))
    return restores, held


# Py_TPFLAGS_HEAPTYPE
_MADE_BY_PYTHON = 1 << 9


@cache
def _descriptors(cls: Any) -> tuple[Any, tuple[Any, ...]]:
    """What reads ``__dict__`` and the slots, whatever ``__getattr__`` or a property say."""
    kinds = (types.GetSetDescriptorType, types.MemberDescriptorType)
    own = [vars(base) for base in cls.__mro__]
    attributes = (each.get("__dict__") for each in own)
    slots = [value for each in own if "__slots__" in each for value in each.values()]
    return (
        next((each for each in attributes if isinstance(each, kinds)), None),
        tuple(each for each in slots if isinstance(each, types.MemberDescriptorType)),
    )


def _restore_class(obj: Any, cls: type) -> None:
    if type(obj) is not cls:
        object.__setattr__(obj, "__class__", cls)


def _restore_slot(slot: Any, obj: Any, value: Any) -> None:
    if value is not _UNSET:
        slot.__set__(obj, value)
    elif hasattr(type(obj), slot.__name__):
        try:
            slot.__delete__(obj)
        except AttributeError:
            # It is not set now either.
            return


def keep_class(cls: type) -> Kept:
    """The attributes of a class that are no methods.

    Args:
        cls: A class.
    """
    own = _values_of_class(cls)
    return [partial(_restore_class_attributes, cls, own)], [*own.values(), *cls.__bases__]


def _values_of_class(cls: type) -> dict[str, Any]:
    methods = (classmethod, staticmethod)
    return {
        name: value
        for name, value in vars(cls).items()
        if not name.startswith("__")
        and not isinstance(value, methods)
        and not callable(value)
        and not hasattr(type(value), "__get__")
    }


def _restore_class_attributes(cls: type, before: dict[str, Any]) -> None:
    now = _values_of_class(cls)
    for name in now.keys() - before.keys():
        delattr(cls, name)
    for name, value in before.items():
        if now.get(name, _UNSET) is not value:
            setattr(cls, name, value)


def keep_dict(obj: dict[Any, Any]) -> Kept:
    """Keys and values, in their order.

    Args:
        obj: A dict.
    """
    items = _items(obj)
    restore = partial(_restore_dict, obj, items)
    return [restore], [each for item in items for each in item]


def _items(obj: dict[Any, Any]) -> list[tuple[Any, Any]]:
    # It keeps an order of its own.
    cls: Any = OrderedDict if isinstance(obj, OrderedDict) else dict
    return list(cls.items(obj))


def _restore_dict(obj: dict[Any, Any], items: list[tuple[Any, Any]]) -> None:
    now = _items(obj)
    if len(now) == len(items) and all(
        a[0] is b[0] and a[1] is b[1] for a, b in zip(now, items, strict=True)
    ):
        return
    cls: Any = OrderedDict if isinstance(obj, OrderedDict) else dict
    cls.clear(obj)
    for key, value in items:
        cls.__setitem__(obj, key, value)


def keep_list(obj: Any) -> Kept:
    """The content of a list, bytearray or array.

    Args:
        obj: The sequence.
    """
    cls = next(each for each in _SEQUENCES if isinstance(obj, each))
    content = cls.__getitem__(obj, slice(None))
    restore = partial(cls.__setitem__, obj, slice(None), content)
    return [restore], content if cls is list else ()


_SEQUENCES: tuple[Any, ...] = (list, bytearray, array.array)


def keep_tuple(obj: Any) -> Kept:
    """Nothing of it can change, but of what is in it.

    Args:
        obj: A tuple or frozenset.
    """
    cls: Any = tuple if isinstance(obj, tuple) else frozenset
    return [], list(cls.__iter__(obj))


def keep_collection(obj: Any) -> Kept:
    """The content of a deque or set.

    Args:
        obj: The collection.
    """
    cls: Any = deque if isinstance(obj, deque) else set
    content = list(cls.__iter__(obj))
    return [partial(_restore_collection, cls, obj, content)], content


def _restore_collection(cls: Any, obj: Any, content: list[Any]) -> None:
    cls.clear(obj)
    (cls.extend if cls is deque else cls.update)(obj, content)


def keep_array(obj: Any) -> Kept:
    """The content of an array of numpy, and the objects in it.

    Args:
        obj: The array.
    """
    restores: list[Restore] = []
    if obj.flags.writeable:
        restores.append(partial(_restore_array, obj, obj.copy()))
    return restores, obj.ravel().tolist() if obj.dtype.hasobject else ()


def _restore_array(obj: Any, content: Any) -> None:
    if obj.shape != content.shape:
        obj.resize(content.shape, refcheck=False)
    np.copyto(obj, content)


def keep_function(obj: Any) -> Kept:
    """What a closure has of the function around it, and defaults.

    Args:
        obj: A function.
    """
    return [], [*(obj.__closure__ or ()), obj.__defaults__, obj.__kwdefaults__]


def keep_cell(obj: Any) -> Kept:
    """A variable of a closure.

    Args:
        obj: The cell.
    """
    try:
        value = obj.cell_contents
    except ValueError:
        # Nothing is assigned to it yet.
        return [], ()
    return [partial(setattr, obj, "cell_contents", value)], (value,)


def keep_method(obj: Any) -> Kept:
    """The object of a bound method, and the function.

    Args:
        obj: The method.
    """
    return [], (obj.__self__, obj.__func__)


def keep_partial(obj: Any) -> Kept:
    """The function and its arguments.

    Args:
        obj: A ``functools.partial``.
    """
    return [], (obj.func, obj.args, obj.keywords)


def keep_generator(obj: Any) -> Kept:
    """Where a generator is, which cannot go back: it is told in words that it has gone on.

    Args:
        obj: A generator of Python.
    """
    return [partial(_warn_of_progress, obj, _position(obj))], ()


def _position(obj: Any) -> list[Any]:
    frame = obj.gi_frame
    return [] if frame is None else [frame.f_lasti, *frame.f_locals.values()]


def _warn_of_progress(obj: Any, before: list[Any]) -> None:
    now = _position(obj)
    if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
        logger.warning(
            "What a trial took from the generator %s will be missing in the training: "
            "iterate a loader or a list instead.",
            obj.__qualname__,
        )


def keep_random(obj: Any) -> Kept:
    """The state of a random generator.

    Args:
        obj: A generator of torch, numpy or Python.
    """
    if isinstance(obj, torch.Generator):
        return [partial(_restore_torch_generator, obj, obj.get_state())], ()
    if isinstance(obj, random.SystemRandom):
        return [], ()
    if isinstance(obj, random.Random):
        return [partial(obj.setstate, obj.getstate())], ()
    if isinstance(obj, np.random.RandomState):
        return [partial(obj.set_state, obj.get_state())], ()
    bits = obj.bit_generator if isinstance(obj, np.random.Generator) else obj
    return [partial(setattr, bits, "state", bits.state)], ()


def _restore_torch_generator(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def keep_tensor(tensor: Tensor) -> Kept:
    """Its data, gradient, hooks, and whether it needs a gradient.

    Args:
        tensor: Any tensor.
    """
    restores: list[Restore] = []
    if is_lazy(tensor):
        restores.append(partial(_restore_data, tensor, torch.empty(0)))
        return restores, ()
    if tensor.is_nested and tensor.layout is torch.strided:
        return restores, tensor.unbind()
    if not tensor.is_meta:
        copy = local(tensor.detach()).to("cpu", copy=True)
        restores.append(partial(_restore_tensor, tensor, copy))
    if not tensor.is_leaf:
        return restores, ()
    gradient = tensor.grad
    restores.append(partial(_restore_leaf, tensor, gradient, tensor.requires_grad))
    hooks = [getattr(tensor, name, None) for name in _HOOKS]
    restores.append(partial(_restore_hooks, tensor, hooks))
    return restores, (gradient, *hooks)


_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def _restore_data(tensor: Tensor, data: Tensor) -> None:
    tensor.data = data.to(tensor.device)


@torch.no_grad()
def _restore_tensor(tensor: Tensor, copy: Tensor) -> None:
    here = local(tensor.detach())
    if not is_shard(tensor):
        # A graph that needs the tensor may be kept for another backward pass.
        here = here.data
    if here.shape != copy.shape or here.dtype != copy.dtype or here.is_sparse:
        # Somebody has given it other data.
        _restore_data(tensor, copy)
    elif here.layout is torch.strided:
        for dim, stride in enumerate(here.stride()):
            if stride == 0:
                # Expanded: one element in many places.
                here, copy = here.narrow(dim, 0, 1), copy.narrow(dim, 0, 1)
        here.copy_(copy)
    else:
        here.copy_(copy)


def _restore_leaf(tensor: Tensor, gradient: Tensor | None, requires: bool) -> None:
    if not tensor.is_leaf:
        tensor.detach_()
    if tensor.grad is not gradient:
        tensor.grad = gradient
    if tensor.requires_grad != requires:
        tensor.requires_grad_(requires)


def _restore_hooks(tensor: Tensor, hooks: list[Any]) -> None:
    for name, before in zip(_HOOKS, hooks, strict=True):
        if getattr(tensor, name, None) is not before:
            setattr(tensor, name, before)


def keep_script_module(module: Any) -> Kept:
    """The tensors and the mode of a compiled module, which Python does not see.

    Args:
        module: Of ``torch.jit``.
    """
    buffers = dict(module.named_buffers(recurse=False))
    parameters = module.parameters(recurse=False)
    return (
        [partial(_restore_script_module, module, {"training": module.training, **buffers})],
        [*buffers.values(), *parameters],
    )


def _restore_script_module(module: Any, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        setattr(module, name, value)


# The first that fits; the attributes of an object are kept too.
_KINDS: tuple[tuple[Any, Callable[[Any], Kept]], ...] = (
    (Tensor, keep_tensor),
    (torch.jit.ScriptModule, keep_script_module),
    (dict, keep_dict),
    (_SEQUENCES, keep_list),
    ((tuple, frozenset), keep_tuple),
    ((deque, set), keep_collection),
    (np.ndarray, keep_array),
    (types.FunctionType, keep_function),
    (types.CellType, keep_cell),
    (types.MethodType, keep_method),
    (partial, keep_partial),
    (types.GeneratorType, keep_generator),
    (
        (torch.Generator, random.Random, np.random.RandomState, np.random.Generator,
         np.random.BitGenerator),
        keep_random,
    ),
)  # fmt: skip


def keeper_of(cls: type) -> Callable[[Any], Kept] | None:
    """What keeps more than the attributes of the objects of a class.

    Args:
        cls: The class.
    """
    return next((keep for kind, keep in _KINDS if issubclass(cls, kind)), None)
