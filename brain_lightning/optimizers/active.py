"""The optimizers of a Brain: which there are, and which are active."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from torch.nn import Module, Parameter
from torch.optim import Optimizer

from brain_lightning.protocol import BrainProtocol, optimizers_of, parameters_of


def all_optimizers(brain: BrainProtocol) -> dict[str, Optimizer]:
    """Every optimizer of a Brain, as it is now: recipes replace them during a run.

    Args:
        brain: The Brain after ``init_optimizers``.

    Returns:
        ``optimizers_dict``; where an older ``init_optimizers`` does not fill
        it, ``optimizer`` alone (``speechbrain.Brain.optimizers_step``).
    """
    if brain.optimizers_dict is not None:
        return brain.optimizers_dict
    optimizer = getattr(brain, "optimizer", None)
    if brain.opt_class is None or optimizer is None:
        return {}
    return {"optimizer": optimizer}


def has_optimizer(brain: BrainProtocol) -> bool:
    """Whether a Brain has an optimizer, if only one that it steps itself.

    Args:
        brain: The Brain after ``init_optimizers``.
    """
    if brain.optimizers_dict or all_optimizers(brain):
        return True
    return any(True for _ in optimizers_of(brain))


def active_optimizers(brain: BrainProtocol) -> Mapping[str, Optimizer]:
    """The optimizers that ``freeze_optimizers`` leaves active now.

    Args:
        brain: The Brain after ``init_optimizers``.

    Returns:
        Optimizers by name, in the order in which they step.
    """
    if brain.optimizers_dict is not None:
        return brain.freeze_optimizers(brain.optimizers_dict)
    return all_optimizers(brain)


def trained_parameters(brain: BrainProtocol) -> Iterable[Parameter]:
    """The parameters of all optimizers and of all modules, some of them twice.

    Of all: a recipe may step one itself, which has gathered gradients of earlier batches; and
    perhaps one that is not found.

    Args:
        brain: The Brain after ``init_optimizers``.
    """
    optimized = (parameters_of(each) for _, each in optimizers_of(brain))
    return chain(chain.from_iterable(optimized), brain.modules.parameters())


def split_vectors_from_weight_decay(modules: Module) -> list[dict[str, Any]]:
    """Parameter groups in which vectors, such as biases and norms, do not decay.

    Args:
        modules: The modules to optimize.

    Returns:
        Two groups, the one without decay first
        (``speechbrain.utils.optimizers.rm_vector_weight_decay``).
    """
    trainable = [p for p in modules.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.dim() == 1], "weight_decay": 0.0},
        {"params": [p for p in trainable if p.dim() != 1]},
    ]
