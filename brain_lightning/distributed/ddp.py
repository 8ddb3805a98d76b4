"""Wraps each entry of a Brain's modules in DistributedDataParallel, as SpeechBrain does.

Lightning wraps the whole LightningModule instead. Such a wrapper does not average the
gradients of a ``loss.backward()`` in a recipe, and ``self.modules.generator.module`` would
not exist.
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

# Ids of the parameters that were trainable when a module was wrapped. DDP averages only these.
_wrapped: WeakKeyDictionary[Module, frozenset[int]] = WeakKeyDictionary()


def wrap_modules(brain: BrainProtocol) -> None:
    """Wraps each entry with trainable parameters (``speechbrain.Brain._wrap_distributed``).

    An entry that is already wrapped is not changed, unless a parameter was frozen or unfrozen
    since. In that case the ranks would diverge without an error.

    Args:
        brain: Brain on its device, with compiled modules, in a process group. The
            ``ddp_arguments`` of its settings are passed to ``DistributedDataParallel``.

    Raises:
        UnsupportedError: A module has a SyncBatchNorm on the CPU.
    """
    for name, module in brain.modules.items():
        # The value of an entry is None if the recipe leaves the module out.
        parameters = () if module is None else module.parameters()
        trainable = frozenset(id(p) for p in parameters if p.requires_grad)
        if module is not None and _wrapped.get(module) != trainable:
            brain.modules[name] = inner = _unwrapped(module)
            if trainable:
                brain.modules[name] = _wrap(brain, name, inner)
                _wrapped[brain.modules[name]] = trainable


def unwrap_modules(brain: BrainProtocol) -> None:
    """Removes the wrappers of an earlier run, before modules are compiled again.

    Args:
        brain: Brain at the start of training.
    """
    for name, module in brain.modules.items():
        if isinstance(module, DistributedDataParallel):
            brain.modules[name] = module.module


def _unwrapped(module: Module) -> Module:
    return module.module if isinstance(module, DistributedDataParallel) else module


class _BypassWarning:
    """Warns once if a module is called without its wrapper, as in ``hparams.model(...)``.

    Its gradients are then not averaged, as in SpeechBrain, and the ranks diverge without an
    error.

    Args:
        name: Name of the entry of ``brain.modules``.
        wrapper: The entry.
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
            "%r is called without its DistributedDataParallel, so its gradients are not "
            "averaged over processes. Call self.modules.%s(...), not self.hparams or the "
            "wrapped module.",
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
    """Converts BatchNorm to SyncBatchNorm, which needs a GPU. On the CPU, SpeechBrain crashes.

    Args:
        device_type: Type of the device that trains the entry.
        name: Name of the entry of ``brain.modules``.
        module: The entry.

    Returns:
        The module or its replacement.

    Raises:
        UnsupportedError: The module has a SyncBatchNorm on the CPU.
    """
    if device_type != "cpu":
        return SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-any-return, no-untyped-call]
    if any(isinstance(part, SyncBatchNorm) for part in module.modules()):
        raise UnsupportedError(
            f"{name!r} has a SyncBatchNorm, which needs a GPU. On the CPU, use BatchNorm and "
            "do not set Trainer(sync_batchnorm=True)."
        )
    if any(isinstance(part, _BatchNorm) for part in module.modules()):
        logger.warning(
            "%r has a BatchNorm. On the CPU, each process computes its own batch statistics, "
            "because SyncBatchNorm needs a GPU.",
            name,
        )
    return module


def unwrapped_name(name: str, brain: BrainProtocol) -> str:
    """Returns the name of a parameter of ``brain.modules`` without the wrapper's prefix.

    Args:
        name: Name such as ``model.module.weight``.
        brain: Brain whose entries may be wrapped.

    Returns:
        Name such as ``model.weight``.
    """
    entry, _, rest = name.partition(".")
    wrapped = entry in brain.modules and isinstance(
        brain.modules[entry], DistributedDataParallel
    )
    return f"{entry}.{rest.removeprefix('module.')}" if wrapped else name


# Prefix that torch.compile adds to the names of a module.
COMPILED_PREFIX = "_orig_mod."


def plain_name(name: str, brain: BrainProtocol) -> str:
    """Returns the name of a parameter as if its module was neither compiled nor wrapped.

    Args:
        name: Name in ``brain.modules``.
        brain: Brain whose entries may be wrapped.
    """
    return unwrapped_name(name.replace(COMPILED_PREFIX, ""), brain)
