"""Captures and restores the state of single objects, one level deep, by type.

Each ``capture_`` function takes an object and returns functions that restore its state, and
the objects that it refers to. No function calls a method that a user's class may override,
such as ``__len__``, ``__eq__`` or ``items``.
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
# Functions that restore an object, and the objects that it refers to.
Captured = tuple[list[Restore], Iterable[Any]]

logger = logging.getLogger(__name__)

# Marks an attribute that is not set.
_UNSET = object()


def capture_attributes(obj: Any) -> Captured:
    """Captures the class, the ``__dict__`` and the ``__slots__`` of an object.

    Args:
        obj: Any object. Attributes of shards are not captured, because FSDP2 manages them.
    """
    restores: list[Restore] = []
    held: list[Any] = []
    cls: Any = type(obj)
    if issubclass(cls, Tensor) and is_shard(obj):
        return restores, held
    if cls.__flags__ & _HEAP_TYPE:
        # Lazy and parametrized modules change their class.
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


# Py_TPFLAGS_HEAPTYPE: the class was defined in Python.
_HEAP_TYPE = 1 << 9


@cache
def _descriptors(cls: Any) -> tuple[Any, tuple[Any, ...]]:
    """Returns the descriptors of ``__dict__`` and slots, which bypass ``__getattr__``."""
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
            # The slot is not set now either.
            return


def capture_class(cls: type) -> Captured:
    """Captures the attributes of a class, except for methods and descriptors.

    Args:
        cls: Any class.
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


def capture_dict(obj: dict[Any, Any]) -> Captured:
    """Captures the keys and values of a dict, in their order.

    Args:
        obj: A dict.
    """
    items = _items(obj)
    restore = partial(_restore_dict, obj, items)
    return [restore], [each for item in items for each in item]


def _items(obj: dict[Any, Any]) -> list[tuple[Any, Any]]:
    # An OrderedDict stores its order separately from the dict.
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


def capture_list(obj: Any) -> Captured:
    """Captures the elements of a list, bytearray or ``array.array``.

    Args:
        obj: The sequence.
    """
    cls = next(each for each in _SEQUENCES if isinstance(obj, each))
    content = cls.__getitem__(obj, slice(None))
    restore = partial(cls.__setitem__, obj, slice(None), content)
    return [restore], content if cls is list else ()


_SEQUENCES: tuple[Any, ...] = (list, bytearray, array.array)


def capture_tuple(obj: Any) -> Captured:
    """Returns the elements of a tuple or frozenset, which itself cannot change.

    Args:
        obj: A tuple or frozenset.
    """
    cls: Any = tuple if isinstance(obj, tuple) else frozenset
    return [], list(cls.__iter__(obj))


def capture_collection(obj: Any) -> Captured:
    """Captures the elements of a deque or set.

    Args:
        obj: The collection.
    """
    cls: Any = deque if isinstance(obj, deque) else set
    content = list(cls.__iter__(obj))
    return [partial(_restore_collection, cls, obj, content)], content


def _restore_collection(cls: Any, obj: Any, content: list[Any]) -> None:
    cls.clear(obj)
    (cls.extend if cls is deque else cls.update)(obj, content)


def capture_array(obj: Any) -> Captured:
    """Captures the elements of a NumPy array.

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


def capture_function(obj: Any) -> Captured:
    """Returns the closure cells and the default arguments of a function.

    Args:
        obj: A function.
    """
    return [], [*(obj.__closure__ or ()), obj.__defaults__, obj.__kwdefaults__]


def capture_cell(obj: Any) -> Captured:
    """Captures the value of a closure cell.

    Args:
        obj: The cell.
    """
    try:
        value = obj.cell_contents
    except ValueError:
        # The variable has no value yet.
        return [], ()
    return [partial(setattr, obj, "cell_contents", value)], (value,)


def capture_method(obj: Any) -> Captured:
    """Returns the object and the function of a bound method.

    Args:
        obj: The method.
    """
    return [], (obj.__self__, obj.__func__)


def capture_partial(obj: Any) -> Captured:
    """Returns the function and the arguments of a ``functools.partial``.

    Args:
        obj: A ``functools.partial``.
    """
    return [], (obj.func, obj.args, obj.keywords)


def capture_generator(obj: Any) -> Captured:
    """Captures the position of a generator.

    A generator cannot be restored. If it has advanced, a warning is logged.

    Args:
        obj: A Python generator.
    """
    return [partial(_warn_of_progress, obj, _position(obj))], ()


def _position(obj: Any) -> list[Any]:
    frame = obj.gi_frame
    return [] if frame is None else [frame.f_lasti, *frame.f_locals.values()]


def _warn_of_progress(obj: Any, before: list[Any]) -> None:
    now = _position(obj)
    if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
        logger.warning(
            "A trial has consumed values of the generator %s, and training will not get them. "
            "Use a DataLoader or a list instead.",
            obj.__qualname__,
        )


def capture_random(obj: Any) -> Captured:
    """Captures the state of a random number generator.

    Args:
        obj: A generator of torch, NumPy or Python.
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


def capture_tensor(tensor: Tensor) -> Captured:
    """Captures the data, the gradient, the hooks and ``requires_grad`` of a tensor.

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
        # .data, because a retained graph may still need the tensor for a backward pass.
        here = here.data
    if here.shape != copy.shape or here.dtype != copy.dtype or here.is_sparse:
        # The tensor was assigned other data.
        _restore_data(tensor, copy)
    elif here.layout is torch.strided:
        for dim, stride in enumerate(here.stride()):
            if stride == 0:
                # An expanded tensor stores one element for the whole dimension.
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


def capture_script_module(module: Any) -> Captured:
    """Captures the tensors and the mode of a TorchScript module.

    They are not in ``__dict__``.

    Args:
        module: A ``torch.jit.ScriptModule``.
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


# The first matching type is used. Attributes are captured in addition.
_FUNCTIONS: tuple[tuple[Any, Callable[[Any], Captured]], ...] = (
    (Tensor, capture_tensor),
    (torch.jit.ScriptModule, capture_script_module),
    (dict, capture_dict),
    (_SEQUENCES, capture_list),
    ((tuple, frozenset), capture_tuple),
    ((deque, set), capture_collection),
    (np.ndarray, capture_array),
    (types.FunctionType, capture_function),
    (types.CellType, capture_cell),
    (types.MethodType, capture_method),
    (partial, capture_partial),
    (types.GeneratorType, capture_generator),
    (
        (torch.Generator, random.Random, np.random.RandomState, np.random.Generator,
         np.random.BitGenerator),
        capture_random,
    ),
)  # fmt: skip


def capture_function_of(cls: type) -> Callable[[Any], Captured] | None:
    """Returns the function that captures more than the attributes of objects of a class.

    Args:
        cls: The class.

    Returns:
        The function. None if capturing the attributes is sufficient.
    """
    return next((capture for kind, capture in _FUNCTIONS if issubclass(cls, kind)), None)
