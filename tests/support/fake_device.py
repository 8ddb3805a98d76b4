"""A fake accelerator, ``fake:0``: it is asynchronous, and counts what the host waits for.

It is a PrivateUse1 backend in Python: each operator runs on the CPU's memory, with the bits of
the CPU, and is recorded, as is each wait of the host. A tensor of it is a plain
``torch.Tensor`` whose storage points to memory of the CPU. What a copy to the host with
``non_blocking=True`` has not brought yet is garbage; ``fake_streams.py`` has streams and
events.

``install()`` is for a process of its own: ``torch.accelerator`` finds the device from then on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from . import fake_streams
from .fake_streams import HOST, Event, Memory, Record, Stream, current_stream, recorded
from .processes import check_python

__all__ = ["DEVICE", "Record", "check", "install", "recorded", "trainer"]

DEVICE = "fake:0"
_BACKEND = "PrivateUse1"
_SETUP = "_setup_privateuseone_for_python_backend"
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_empty = torch.empty
_libraries: list[torch.library.Library] = []
# The host has to know a number to go on, or how much memory to ask for.
_WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Indices may be on the CPU; a mask has to be counted first.
_INDEXES = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")


def check(*checks: Callable[[], None]) -> None:
    """Calls functions of a test's module, in a process that has the device.

    Args:
        checks: They take no arguments, and assert something. One process is forked for all.
    """
    if not hasattr(torch.utils.backend_registration, _SETUP):
        pytest.skip(f"torch {torch.__version__} has no backends in Python")
    names = ", ".join(each.__name__ for each in checks)
    calls = "\n".join(f"{each.__name__}()" for each in checks)
    check_python(
        "-W", "error", "-c",
        f"from tests.support.fake_device import install; install()\n"
        f"from {checks[0].__module__} import {names}\n{calls}",
    )  # fmt: skip


def trainer(**arguments: Any) -> dict[str, Any]:
    """``trainer=`` of a fit or an evaluation on it."""
    return {"strategy": SingleDeviceStrategy(device=torch.device(DEVICE)), **arguments}


def install() -> None:
    """Registers the device, for the life of this process."""
    if _libraries:
        return
    getattr(torch.utils.backend_registration, _SETUP)("fake", backend_module=_device_module())
    # A parameter that is moved stays the same object, as on a GPU.
    torch.__future__.set_swap_module_params_on_conversion(True)
    _register_operators()
    _replace_what_the_backend_cannot_have()
    AcceleratorRegistry.register("fake", FakeAccelerator, override=True)


class FakeAccelerator(Accelerator):
    """Lightning's part of it."""

    def setup_device(self, device: torch.device) -> None: ...
    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(DEVICE)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "fake"

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}


# Memory ---------------------------------------------------------------------------------


def _is_fake(value: Any) -> bool:
    return value.device.type == "fake"


def _adopt(cpu: Tensor) -> Tensor:
    """The tensor of the device that has this memory from now on."""
    memory = cpu.untyped_storage()
    storage = torch._C._construct_storage_from_data_pointer(
        memory.data_ptr(), torch.device(DEVICE), memory.nbytes()
    )
    storage.memory = Memory(memory)
    return _view(storage, cpu)


def _view(storage: Any, like: Tensor) -> Tensor:
    new = torch._C._acc.create_empty_tensor((0,), like.dtype)
    return _set(new, storage, like.storage_offset(), like.size(), like.stride())


def _set(
    tensor: Tensor, storage: Any, offset: Any = 0, size: Any = (), stride: Any = ()
) -> Tensor:
    set_ = torch.ops.aten.set_.source_Storage_storage_offset
    return set_.redispatch(_CPU, tensor, storage, offset, size, stride)


def _on_host(tensor: Tensor) -> Tensor:
    """The same memory as a tensor of the CPU."""
    return _empty(0, dtype=tensor.dtype).set_(
        tensor.untyped_storage().memory.storage, tensor.storage_offset(), tensor.size(),
        tensor.stride(),
    )  # fmt: skip


def _use(tensor: Tensor, writes: bool, what: str) -> None:
    tensor.untyped_storage().memory.use(current_stream(), writes, what)


def _queue(what: str) -> Stream:
    stream = current_stream()
    stream.advance()
    HOST.record.calls.append((what, stream.stream_id))
    return stream


# Operators ------------------------------------------------------------------------------


class _Call:
    """One operator, run on the memory of its operands."""

    def __init__(self, op: Any) -> None:
        self.op, self.name = op, op._schema.name
        self.operands: list[tuple[Tensor, Tensor]] = []
        self.strays = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stream = _queue(self.name)
        schema = {a.name: a for a in self.op._schema.arguments}
        values = [*zip(schema, args, strict=False), *kwargs.items()]
        lowered = {
            name: self._lower(value, _is_written(schema[name])) for name, value in values
        }
        if self.strays and self.operands and self.name not in _INDEXES:
            raise RuntimeError(f"{self.name}: tensors of the CPU and of {DEVICE}")
        positional = [lowered.pop(name) for name, _ in values[: len(args)]]
        with torch._C._AutoDispatchBelowAutograd():
            result = self.op(*positional, **lowered)
        for tensor, cpu in self.operands:
            self._update(tensor, cpu)
        if self._waits(args):
            HOST.wait(stream.clock, self.name)
        return self._lift(result)

    def _waits(self, args: Any) -> bool:
        if self.name in _INDEXES:
            return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        return not _WAITS.isdisjoint(self.op.tags)

    def _lower(self, value: Any, writes: bool) -> Any:
        if isinstance(value, Tensor) and _is_fake(value):
            _use(value, writes, self.name)
            self.operands.append((value, _on_host(value)))
            return self.operands[-1][1]
        if isinstance(value, Tensor):
            self.strays += value.dim() > 0
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if isinstance(value, (list, tuple)):
            return [self._lower(each, writes) for each in value]
        return value

    def _lift(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._lift, value))
        if not isinstance(value, Tensor):
            return value
        memory = value.untyped_storage()._cdata
        for tensor, cpu in self.operands:
            if value is cpu:
                return tensor
        for tensor, cpu in self.operands:
            if memory == cpu.untyped_storage()._cdata:
                return _view(tensor.untyped_storage(), value)
        new = _adopt(value)
        _use(new, True, self.name)
        return new

    @staticmethod
    def _update(tensor: Tensor, cpu: Tensor) -> None:
        """The operator may have given an operand another shape, or more memory."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() != cpu.untyped_storage().data_ptr():
            storage = _adopt(cpu).untyped_storage()
        elif (tensor.size(), tensor.stride()) == (cpu.size(), cpu.stride()):
            return
        _set(tensor, storage, cpu.storage_offset(), cpu.size(), cpu.stride())


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    return _Call(op)(*args, **kwargs)


def _item(tensor: Tensor) -> Any:
    stream = _queue("aten::_local_scalar_dense")
    _use(tensor, False, "item")
    HOST.wait(stream.clock, "item")
    return _on_host(tensor).item()


def _to_copy(
    tensor: Tensor, *, device: Any = None, non_blocking: bool = False, **to: Any
) -> Any:
    """``Tensor.to``; without waiting it makes pinned memory, as CUDA does."""
    op = torch.ops.aten._to_copy.default
    if device is None or device.type == "fake":
        return _Call(op)(tensor, **to)
    to.pop("pin_memory", None)
    new = op(_on_host(tensor), **to)
    if non_blocking:
        _pin(new)
    _receive(tensor, new, non_blocking)
    return new


def _copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    """``Tensor.copy_``, where one of both is of the device."""
    if _is_fake(source) and _is_fake(to):
        _Call(torch.ops.aten.copy_.default)(to, source)
    elif _is_fake(to):
        _send(source, to, non_blocking)
    else:
        to.copy_(_on_host(source))
        _receive(source, to, non_blocking)
    return to


def _receive(source: Tensor, to: Tensor, non_blocking: bool) -> None:
    """The host gets a copy, which it has to wait for, now or later."""
    stream = _queue("to host")
    _use(source, False, "copy")
    if non_blocking and _is_pinned(to):
        HOST.receive(to, stream)
    else:
        HOST.wait(stream.clock, "copy to host")


def _send(source: Tensor, to: Tensor, non_blocking: bool) -> None:
    stream = _queue("to device")
    _use(to, True, "copy")
    _on_host(to).copy_(source)
    if not non_blocking:
        HOST.wait(stream.clock, "copy to device")
    elif _is_pinned(source):
        HOST.send(source, stream)


def _set_storage(tensor: Tensor, storage: Any) -> Tensor:
    return _set(tensor, storage, 0, (storage.nbytes() // tensor.itemsize,), (1,))


def _set_tensor(tensor: Tensor, other: Tensor) -> Tensor:
    return _set(
        tensor, other.untyped_storage(), other.storage_offset(), other.size(), other.stride()
    )


def _convolution(*arguments: Any) -> Any:
    return _Call(torch.ops.aten.convolution.default)(*arguments)


def _convolution_backward(gradient: Tensor, tensor: Tensor, weight: Tensor, *rest: Any) -> Any:
    """Without the shape of the bias, which is one number for each channel."""
    backward = torch.ops.aten.convolution_backward.default
    return _Call(backward)(gradient, tensor, weight, [gradient.shape[1]], *rest)


def _register_operators() -> None:
    fallback = torch.library.Library("_", "IMPL")
    fallback.fallback(_fallback, _BACKEND)
    library = torch.library.Library("aten", "IMPL")
    # They live as long as these objects.
    _libraries.extend([fallback, library])
    own: dict[str, Callable[..., Any]] = {
        "_local_scalar_dense": _item,
        "_to_copy": _to_copy,
        "_copy_from": _copy_from,
        "set_.source_Storage_storage_offset": _set,
        "set_.source_Storage": _set_storage,
        "set_.source_Tensor": _set_tensor,
        "convolution_overrideable": _convolution,
        "convolution_backward_overrideable": _convolution_backward,
    }
    for name, function in own.items():
        library.impl(name, function, _BACKEND)
    for name in _kernels_of_the_cpu() - own.keys() - {"copy_"}:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        library.impl(name, functools.partial(_fallback, op), _BACKEND)


def _kernels_of_the_cpu() -> set[str]:
    """Operators that other devices compute in another way, which has other bits."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    composite = ("CompositeImplicitAutograd", "CompositeExplicitAutograd",
                 "CompositeExplicitAutogradNonFunctional")  # fmt: skip
    return {
        name.removeprefix("aten::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("aten::")
        and has(name, "CPU")
        and any(has(name, key) for key in composite)
    }


# torch ----------------------------------------------------------------------------------


def _pin(cpu: Tensor) -> Tensor:
    cpu.untyped_storage().is_fake_pinned = True
    return cpu


def _is_pinned(cpu: Tensor, device: Any = None) -> bool:
    return hasattr(cpu.untyped_storage(), "is_fake_pinned")


def _makes_pinned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def make(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        new = function(*args, **kwargs)
        return _pin(new) if pin_memory else new

    return make


def _replace_what_the_backend_cannot_have() -> None:
    """Pinned memory, streams, events and storages of their own need a backend in C++."""
    tensor: Any = Tensor
    for name in ("empty", "empty_like", "empty_strided", "zeros", "full"):
        setattr(torch, name, _makes_pinned(getattr(torch, name)))
    tensor.pin_memory = lambda self, device=None: _pin(self.clone())
    tensor.is_pinned = _is_pinned
    tensor.record_stream = lambda self, stream: self.untyped_storage().memory.record_stream(
        stream
    )
    places: Any = torch
    places.Event, places.Stream = Event, Stream
    for name in ("current_stream", "set_stream", "synchronize"):
        setattr(torch.accelerator, name, getattr(fake_streams, name))
    clone, move, storage = (
        torch.UntypedStorage.clone,
        torch.UntypedStorage.to,
        places.UntypedStorage,
    )
    storage.clone = lambda self: _clone_storage(self) if _is_fake(self) else clone(self)
    storage.to = lambda self, *, device, non_blocking=False: (
        _storage_to_device(self, non_blocking)
        if torch.device(device).type == "fake"
        else move(self, device=device, non_blocking=non_blocking)
    )


def _clone_storage(storage: Any) -> Any:
    source = _empty(0, dtype=torch.uint8, device=DEVICE).set_(storage)
    return source.clone().untyped_storage()


def _storage_to_device(storage: Any, non_blocking: bool) -> Any:
    if _is_fake(storage):
        return storage
    source = _empty(0, dtype=torch.uint8).set_(storage)
    return source.to(DEVICE, non_blocking=non_blocking).untyped_storage()


def _device_module() -> ModuleType:
    module: Any = ModuleType("torch.fake")
    cpu = torch.random
    names = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_is_in_bad_fork": lambda: False,
        "_is_compiled": lambda: True,
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        # It draws from the CPU's generator, to draw the same.
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: cpu.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "empty_cache": lambda: None,
        # There is room for everything, unless a test says otherwise.
        "mem_get_info": lambda device=None: (1 << 30, 1 << 30),
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "stream": lambda stream: stream,
        "Stream": Stream,
        "Event": Event,
        "current_stream": current_stream,
        "synchronize": fake_streams.synchronize,
    }
    vars(module).update(names)
    return module
