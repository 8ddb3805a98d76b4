"""Wraps each entry of a Brain's modules in DistributedDataParallel, as SpeechBrain does.

A single wrapper around the LightningModule, which is what Lightning makes, does not
average the gradients of a recipe's own ``loss.backward()``, and gives a recipe's
``self.modules.generator.module`` no meaning.
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

# The parameters that were trainable when they were wrapped: a wrapper averages no others.
_wrapped: WeakKeyDictionary[Module, frozenset[int]] = WeakKeyDictionary()


def wrap_modules(brain: BrainProtocol) -> None:
    """Wraps each entry that can be trained (``speechbrain.Brain._wrap_distributed``).

    One that is wrapped already stays as it is, unless a parameter was frozen or
    unfrozen since: the ranks would diverge silently.

    Args:
        brain: The Brain, on its device, in a process group; compiled already. The
            ``ddp_arguments`` of its settings are given to ``DistributedDataParallel``.

    Raises:
        UnsupportedError: There is a SyncBatchNorm on the CPU.
    """
    for name, module in brain.modules.items():
        # None stands for a module that is left out.
        parameters = () if module is None else module.parameters()
        trainable = frozenset(id(p) for p in parameters if p.requires_grad)
        if module is not None and _wrapped.get(module) != trainable:
            brain.modules[name] = inner = _unwrapped(module)
            if trainable:
                brain.modules[name] = _wrap(brain, name, inner)
                _wrapped[brain.modules[name]] = trainable


def unwrap_modules(brain: BrainProtocol) -> None:
    """Removes the wrappers of an earlier run, before anything is compiled again.

    Args:
        brain: The Brain at the start of a training.
    """
    for name, module in brain.modules.items():
        if isinstance(module, DistributedDataParallel):
            brain.modules[name] = module.module


def _unwrapped(module: Module) -> Module:
    return module.module if isinstance(module, DistributedDataParallel) else module


class _BypassWarning:
    """Warns once when a module is called without its wrapper, as ``hparams.model(...)``.

    Its gradients are not averaged then, nor are they in SpeechBrain, and the ranks
    diverge silently.

    Args:
        name: The entry of ``brain.modules``.
        wrapper: What is there.
    """

    def __init__(self, name: str, wrapper: DistributedDataParallel) -> None:
        self._name = name
        self._is_in_wrapper = False
        self._warned = False
        wrapper.register_forward_pre_hook(self._enter)
        wrapper.register_forward_hook(self._leave, always_call=True)
        wrapper.module.register_forward_pre_hook(self._check)

    def _enter(self, *_: object) -> None:
        self._is_in_wrapper = True

    def _leave(self, *_: object) -> None:
        self._is_in_wrapper = False

    def _check(self, module: Module, _: object) -> None:
        averaged = self._is_in_wrapper or not (module.training and torch.is_grad_enabled())
        if averaged or self._warned:
            return
        self._warned = True
        logger.warning(
            "%r is called around its DistributedDataParallel: its gradients are not averaged "
            "over processes. Call self.modules.%s(...), not what it wraps, nor hparams",
            self._name,
            self._name,
        )


def _wrap(brain: BrainProtocol, name: str, module: Module) -> Module:
    index = next(module.parameters()).device.index
    arguments = {"find_unused_parameters": brain.find_unused_parameters}
    wrapper = DistributedDataParallel(
        with_batchnorm_for(torch.device(brain.device).type, name, module),
        device_ids=None if index is None else [index],
        **{**arguments, **brain._lightning.ddp_arguments},
    )
    _BypassWarning(name, wrapper)
    return wrapper


def with_batchnorm_for(device_type: str, name: str, module: Module) -> Module:
    """An entry with SyncBatchNorm, which exists for GPUs only; SpeechBrain crashes on the CPU.

    Args:
        device_type: Where it is trained.
        name: The entry of ``brain.modules``.
        module: What is there.

    Returns:
        The module, or what replaces it.

    Raises:
        UnsupportedError: There is a SyncBatchNorm on the CPU.
    """
    if device_type != "cpu":
        return SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-any-return, no-untyped-call]
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


def unwrapped_name(name: str, brain: BrainProtocol) -> str:
    """The name that a parameter of ``brain.modules`` has without a wrapper.

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


# What torch.compile puts before the names of a module.
COMPILED_PREFIX = "_orig_mod."


def plain_name(name: str, brain: BrainProtocol) -> str:
    """The name that a parameter has where nothing is compiled or wrapped.

    Args:
        name: As ``brain.modules`` has it.
        brain: Its modules say which entries are wrapped.
    """
    return unwrapped_name(name.replace(COMPILED_PREFIX, ""), brain)
