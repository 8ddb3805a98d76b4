"""How objects of each class are saved and recovered, as ``speechbrain.utils.checkpoints``.

Classes that are registered with SpeechBrain work here too, where it is in use.
"""

from __future__ import annotations

import functools
import inspect
import logging
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from brain_lightning.compat.speechbrain import default_hooks
from brain_lightning.compat.versions import PLAIN_GLOBALS
from brain_lightning.distributed.communication import if_main_process
from brain_lightning.errors import CheckpointError

logger = logging.getLogger(__name__)

Hook = Callable[..., Any]
Method = TypeVar("Method", bound=Callable[..., Any])
Class = TypeVar("Class", bound=type)

# Parameters that SpeechBrain has renamed since, with and without their typing errors.
KEYS_MAPPING = {
    ".mutihead_attn": ".multihead_attn",
    ".convs_intermedite": ".convs_intermediate",
}


def state_to_save(obj: Any) -> dict[str, Any]:
    """What the default saver writes.

    Args:
        obj: Anything with a ``state_dict``.
    """
    state: dict[str, Any] = obj.state_dict()
    if not state:
        logger.warning("Saving an empty state_dict for %s.", type(obj).__name__)
    # What refers to a method cannot be pickled: CyclicLR keeps one, and makes it anew.
    unpicklable = {name for name, value in state.items() if inspect.ismethod(value)}
    unpicklable |= {"_scale_fn_ref"} & state.keys()
    # As it is where it can be: modules keep the version of each part in an attribute of it.
    return {n: v for n, v in state.items() if n not in unpicklable} if unpicklable else state


def torch_save(obj: Any, path: str | Path) -> None:
    """Saves the ``state_dict`` of a module, an optimizer or a scheduler.

    Args:
        obj: The object.
        path: The file.
    """
    write_state(state_to_save(obj), path)


def write_state(state: Any, path: str | Path) -> None:
    """Writes a state.

    Args:
        state: Tensors and plain values.
        path: The file.

    Raises:
        OSError: It could not be written; torch has another error for each case.
    """
    try:
        torch.save(state, path)
    except RuntimeError as error:
        raise OSError(f"torch could not write {path}: {error}") from error


def load_state(path: str | Path) -> dict[str, Any]:
    """Reads a ``state_dict`` without running anything that is in it.

    Args:
        path: The file.

    Returns:
        The state, on the CPU; keys that SpeechBrain has renamed have their new names.

    Raises:
        CheckpointError: The file is damaged, or would run code.
    """
    torch.serialization.add_safe_globals(PLAIN_GLOBALS)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} would run code when loaded, or is damaged: only tensors and plain values "
            f"are loaded ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return _with_new_names(state) if isinstance(state, dict) else state


def _with_new_names(state: dict[str, Any]) -> dict[str, Any]:
    for old, new in KEYS_MAPPING.items():
        for key in [key for key in state if isinstance(key, str) and old in key]:
            state[key.replace(old, new)] = state.pop(key)
    return state


def apply_state(obj: Any, state: Mapping[str, Any]) -> None:
    """Gives an object the state that was read.

    Args:
        obj: Anything with a ``load_state_dict``.
        state: What ``load_state`` returned.
    """
    if isinstance(obj, torch.nn.Module):
        obj.load_state_dict(state, strict=True)
    else:
        obj.load_state_dict(state)


def torch_recovery(obj: Any, path: str | Path, end_of_epoch: bool) -> None:  # noqa: ARG001
    """Recovers what ``torch_save`` has saved.

    Args:
        obj: The object.
        path: The file.
        end_of_epoch: Of no importance here.
    """
    apply_state(obj, load_state(path))


def torch_parameter_transfer(obj: torch.nn.Module, path: str | Path) -> None:
    """Gives a module those parameters of a file that it has, and tells of the others.

    Args:
        obj: The module.
        path: The file.
    """
    result = obj.load_state_dict(load_state(path), strict=False)
    for key in result.missing_keys:
        logger.warning("Parameter transfer from %s: it has no parameter %s", path, key)
    for key in result.unexpected_keys:
        logger.warning("Parameter transfer from %s: no use for parameter %s", path, key)


STATEFUL = (
    torch.nn.Module,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    torch.GradScaler,
)
DEFAULT_SAVE_HOOKS: dict[type, Hook] = dict.fromkeys(STATEFUL, torch_save)
DEFAULT_LOAD_HOOKS: dict[type, Hook] = dict.fromkeys(STATEFUL, torch_recovery)
DEFAULT_TRANSFER_HOOKS: dict[type, Hook] = {torch.nn.Module: torch_parameter_transfer}


def save_hook(obj: Any) -> Hook | None:
    """How an object is saved: as its class was registered, else by its ``state_dict``.

    Args:
        obj: The object.
    """
    return _hook(obj, DEFAULT_SAVE_HOOKS, "SAVE", torch_save, "state_dict")


def load_hook(obj: Any) -> Hook | None:
    """How an object is recovered: as its class was registered, else by ``load_state_dict``.

    Args:
        obj: The object.
    """
    return _hook(obj, DEFAULT_LOAD_HOOKS, "LOAD", torch_recovery, "load_state_dict")


def _hook(
    obj: Any, hooks: dict[type, Hook], kind: str, default: Hook, needs: str
) -> Hook | None:
    theirs = {
        cls: hook
        for cls, hook in default_hooks(kind).items()
        # Its hooks for torch's own classes do what ours do, but run what they load.
        if not cls.__module__.startswith("torch.")
    }
    registered = get_default_hook(obj, {**theirs, **hooks})
    if registered is None and hasattr(obj, needs):
        return default
    return registered


def get_default_hook(obj: Any, default_hooks: Mapping[type, Hook]) -> Hook | None:
    """The hook of an object's class, or of the first of its bases that has one.

    Args:
        obj: The object.
        default_hooks: Hooks by class.

    Returns:
        The hook, or None.
    """
    return next((default_hooks[c] for c in type(obj).__mro__ if c in default_hooks), None)


def mark_as_saver(method: Method) -> Method:
    """Marks the method that saves, for ``register_checkpoint_hooks``.

    Args:
        method: Takes a path.

    Raises:
        TypeError: Its signature is another.
    """
    return _marked(method, "_speechbrain_saver", "saver", "path")


def mark_as_loader(method: Method) -> Method:
    """Marks the method that recovers, for ``register_checkpoint_hooks``.

    Args:
        method: Takes a path, and whether it was the end of an epoch.

    Raises:
        TypeError: Its signature is another.
    """
    return _marked(method, "_speechbrain_loader", "loader", "path", "end_of_epoch")


def mark_as_transfer(method: Method) -> Method:
    """Marks the method that takes parameters over, for ``register_checkpoint_hooks``.

    Args:
        method: Takes a path.

    Raises:
        TypeError: Its signature is another.
    """
    return _marked(method, "_speechbrain_transfer", "transfer hook", "path")


def _marked(method: Method, mark: str, kind: str, *arguments: str) -> Method:
    try:
        inspect.signature(method).bind(object(), *arguments)
    except TypeError:
        signature = ", ".join(("self", *arguments))
        raise TypeError(
            f"a checkpoint {kind} must have the signature ({signature}), "
            f"{method.__qualname__} has {inspect.signature(method)}"
        ) from None
    setattr(method, mark, True)
    return method


def register_checkpoint_hooks(cls: Class, save_on_main_only: bool = True) -> Class:
    """Registers the marked methods of a class, as a decorator.

    Args:
        cls: The class.
        save_on_main_only: Whether only the first of several processes saves; False
            for a saver that gathers something first.

    Returns:
        The class.
    """
    for method in vars(cls).values():
        if hasattr(method, "_speechbrain_saver"):
            DEFAULT_SAVE_HOOKS[cls] = _on_main(method) if save_on_main_only else method
        if hasattr(method, "_speechbrain_loader"):
            DEFAULT_LOAD_HOOKS[cls] = method
        if hasattr(method, "_speechbrain_transfer"):
            DEFAULT_TRANSFER_HOOKS[cls] = method
    return cls


def _on_main(method: Hook) -> Hook:
    @functools.wraps(method)
    def on_main(obj: Any, path: str | Path) -> None:
        if if_main_process():
            method(obj, path)

    return on_main


def is_finite(obj: Any) -> bool:
    """Whether every parameter that is trained is finite; others may hold what they like.

    Args:
        obj: Anything; what is no module is finite.
    """
    if not isinstance(obj, torch.nn.Module):
        return True
    return all(_is_finite(p.detach()) for p in obj.parameters() if p.requires_grad)


def _is_finite(tensor: Tensor) -> bool:
    if is_lazy(tensor):
        return True
    if tensor.element_size() == 1:
        # torch has no sum of 8-bit floats.
        tensor = tensor.float()
    # A sum is cheap, and suspicious where it is not finite: it may have overflowed.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
