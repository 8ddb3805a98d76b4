"""Each entry of a Brain's modules in a DistributedDataParallel of its own, as in SpeechBrain.

One for the whole LightningModule, which is Lightning's way, averages no gradient
of a ``loss.backward()`` that a recipe calls itself, and does not know what a
recipe means by ``self.modules.generator.module``.
"""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary

import torch
from torch.nn import Module, SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from brain_lightning.errors import UnsupportedError
from brain_lightning.protocol import BrainProtocol

logger = logging.getLogger(__name__)


# The parameters that could be trained when they were wrapped: a wrapper averages no others.
_wrapped: WeakKeyDictionary[Module, frozenset[int]] = WeakKeyDictionary()


def wrap_modules(brain: BrainProtocol) -> None:
    """Wraps each entry that can be trained (``speechbrain.Brain._wrap_distributed``).

    One that is wrapped already stays as it is, unless a parameter was frozen or
    unfrozen since: the ranks would drift apart without a word.

    Args:
        brain: The Brain, on its device, in a process group; compiled already. Its
            ``ddp_arguments``, if it has any, are given to ``DistributedDataParallel``.

    Raises:
        UnsupportedError: There is a SyncBatchNorm on the CPU.
    """
    for name, module in brain.modules.items():
        trainable = frozenset(id(p) for p in module.parameters() if p.requires_grad)
        if _wrapped.get(module) != trainable:
            brain.modules[name] = inner = _unwrapped(module)
            if trainable:
                brain.modules[name] = _wrap(brain, name, inner)
                _wrapped[brain.modules[name]] = trainable


def unwrap_modules(brain: BrainProtocol) -> None:
    """Takes the wrappers of an earlier run away, before anything is compiled anew.

    Args:
        brain: The Brain at the start of a training.
    """
    for name, module in brain.modules.items():
        brain.modules[name] = _unwrapped(module)


def _unwrapped(module: Module) -> Module:
    return module.module if isinstance(module, DistributedDataParallel) else module


class _PassedBy:
    """Tells of a module that is called around its wrapper, as ``hparams.model(...)``.

    Its gradients are not averaged then, in SpeechBrain neither, and the ranks drift
    apart without a word.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._inside = False
        self._told = False

    def watch(self, wrapper: Module, module: Module) -> None:
        wrapper.register_forward_pre_hook(self._enter)
        wrapper.register_forward_hook(self._leave, always_call=True)
        module.register_forward_pre_hook(self._called)

    def _enter(self, *_: object) -> None:
        self._inside = True

    def _leave(self, *_: object) -> None:
        self._inside = False

    def _called(self, module: Module, _: object) -> None:
        if self._inside or self._told or not (module.training and torch.is_grad_enabled()):
            return
        self._told = True
        logger.warning(
            "%r is called around its DistributedDataParallel: its gradients are not averaged "
            "over processes. Call self.modules.%s(...), not what it wraps, nor hparams",
            self._name,
            self._name,
        )


def _wrap(brain: BrainProtocol, name: str, module: Module) -> Module:
    wrapper = _wrapped_by(brain, name, module)
    _PassedBy(name).watch(wrapper, wrapper.module)
    return wrapper


def _wrapped_by(brain: BrainProtocol, name: str, module: Module) -> DistributedDataParallel:
    arguments = {"find_unused_parameters": brain.find_unused_parameters}
    return DistributedDataParallel(
        _with_batchnorm_for(brain.device_type, name, module),
        device_ids=_device_ids(module),
        **{**arguments, **getattr(brain, "ddp_arguments", {})},
    )


def _device_ids(module: Module) -> list[int] | None:
    index = next(module.parameters()).device.index
    return None if index is None else [index]


def _with_batchnorm_for(device_type: str, name: str, module: Module) -> Module:
    """SyncBatchNorm exists for GPUs alone, and SpeechBrain crashes without one."""
    if device_type != "cpu":
        synchronized: Module = SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        return synchronized
    if any(isinstance(part, SyncBatchNorm) for part in module.modules()):
        raise UnsupportedError(
            f"{name!r} has a SyncBatchNorm, which needs a GPU: use BatchNorm on the CPU, and "
            "no Trainer(sync_batchnorm=True)"
        )
    if any(isinstance(part, _BatchNorm) for part in module.modules()):
        logger.warning(
            "%r has a BatchNorm, which computes the statistics of each process on its own "
            "on the CPU (SyncBatchNorm needs a GPU)",
            name,
        )
    return module


def without_wrapper(name: str, brain: BrainProtocol) -> str:
    """The name that a parameter of ``brain.modules`` has where nothing is wrapped.

    Args:
        name: Such as ``model.module.weight``.
        brain: Its modules say which entries are wrapped.

    Returns:
        Such as ``model.weight``.
    """
    entry, _, rest = name.partition(".")
    wrapped = entry in brain.modules and isinstance(
        brain.modules[entry], DistributedDataParallel
    )
    return f"{entry}.{rest.removeprefix('module.')}" if wrapped else name
