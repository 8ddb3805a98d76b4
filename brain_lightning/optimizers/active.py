"""Finds the optimizers of a Brain, and those that are active."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from torch.nn import Module, Parameter
from torch.optim import Optimizer

from brain_lightning.protocol import BrainProtocol, optimizers_of, parameters_of


def all_optimizers(brain: BrainProtocol) -> dict[str, Optimizer]:
    """Returns all optimizers of a Brain now. Recipes may replace them during a run.

    Args:
        brain: Brain after ``init_optimizers``.

    Returns:
        ``optimizers_dict``. If an older ``init_optimizers`` does not fill it, only
        ``optimizer`` (``speechbrain.Brain.optimizers_step``).
    """
    if brain.optimizers_dict is not None:
        return brain.optimizers_dict
    optimizer = getattr(brain, "optimizer", None)
    if brain.opt_class is None or optimizer is None:
        return {}
    return {"optimizer": optimizer}


def has_optimizer(brain: BrainProtocol) -> bool:
    """Returns whether a Brain has an optimizer, including one that the recipe steps itself.

    Args:
        brain: Brain after ``init_optimizers``.
    """
    if brain.optimizers_dict or all_optimizers(brain):
        return True
    return any(True for _ in optimizers_of(brain))


def active_optimizers(brain: BrainProtocol) -> Mapping[str, Optimizer]:
    """Returns the optimizers that ``freeze_optimizers`` currently leaves active.

    Args:
        brain: Brain after ``init_optimizers``.

    Returns:
        Optimizers by name, in the order in which they step.
    """
    if brain.optimizers_dict is not None:
        return brain.freeze_optimizers(brain.optimizers_dict)
    return all_optimizers(brain)


def trained_parameters(brain: BrainProtocol) -> Iterable[Parameter]:
    """Returns the parameters of all optimizers and all modules. Some occur twice.

    Inactive optimizers are included, because a recipe may step one itself after accumulating
    gradients. Modules are included, because an optimizer of the recipe may not be found.

    Args:
        brain: Brain after ``init_optimizers``.
    """
    optimized = (parameters_of(each) for _, each in optimizers_of(brain))
    return chain(chain.from_iterable(optimized), brain.modules.parameters())


def split_vectors_from_weight_decay(modules: Module) -> list[dict[str, Any]]:
    """Returns parameter groups without weight decay for vectors, such as biases.

    Args:
        modules: Modules to optimize.

    Returns:
        Two groups. The group without weight decay is the first
        (``speechbrain.utils.optimizers.rm_vector_weight_decay``).
    """
    trainable = [p for p in modules.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.dim() == 1], "weight_decay": 0.0},
        {"params": [p for p in trainable if p.dim() != 1]},
    ]
