"""Each entry of a Brain's modules in a DistributedDataParallel of its own, as in SpeechBrain.

One for the whole LightningModule, which is Lightning's way, averages no gradient
of a ``loss.backward()`` that a recipe calls itself, and does not know what a
recipe means by ``self.modules.generator.module``.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.nn import Module, SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from .errors import UnsupportedError
from .protocol import BrainProtocol

logger = logging.getLogger(__name__)


def wrap_modules(brain: BrainProtocol, **arguments: Any) -> None:
    """Wraps each entry that can be trained (``speechbrain.Brain._wrap_distributed``).

    Args:
        brain: The Brain, on its device, in a process group; compiled already, and
            without optimizers.
        **arguments: Of ``DistributedDataParallel``; ``find_unused_parameters`` is the
            Brain's run option unless it is given.

    Raises:
        UnsupportedError: There is a SyncBatchNorm on the CPU.
    """
    arguments = {"find_unused_parameters": brain.find_unused_parameters, **arguments}
    for name, module in brain.modules.items():
        trainable = any(p.requires_grad for p in module.parameters())
        if trainable and not isinstance(module, DistributedDataParallel):
            brain.modules[name] = DistributedDataParallel(
                _with_batchnorm_for(brain.device_type, name, module),
                device_ids=None if brain.device_type == "cpu" else [_index(brain.device)],
                **arguments,
            )


def _index(device: str) -> int:
    index = torch.device(device).index
    return torch.accelerator.current_device_index() if index is None else index


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
