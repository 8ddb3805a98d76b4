"""Save and load hooks of objects, as in ``speechbrain.utils.checkpoints``.

If SpeechBrain is in use, classes that are registered with SpeechBrain work here too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from brain_lightning.compat.load_hooks import LOAD_HOOK, binds, without_device
from brain_lightning.compat.speechbrain import default_hooks, repaired_kind, state_savers
from brain_lightning.distributed.communication import by_main_process
from brain_lightning.fsdp2.state_dict import (
    is_saved_together,
    save_full_optimizers,
    with_full_states,
)
from brain_lightning.temporary import TemporaryAttributes

from . import epoch_files
from .state_files import state_to_save, torch_recovery, torch_save

Hook = Callable[..., Any]
Method = TypeVar("Method", bound=Callable[..., Any])
Class = TypeVar("Class", bound=type)

STATEFUL = (
    torch.nn.Module,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    torch.GradScaler,
)
DEFAULT_SAVE_HOOKS: dict[type, Hook] = dict.fromkeys(STATEFUL, torch_save)
DEFAULT_LOAD_HOOKS: dict[type, Hook] = dict.fromkeys(STATEFUL, torch_recovery)
# Only for SpeechBrain's Pretrainer. It calls the load hook of a class without a transfer hook.
DEFAULT_TRANSFER_HOOKS: dict[type, Hook] = {}


def _on_main(method: Hook) -> Hook:
    @functools.wraps(method)
    def on_main(obj: Any, path: str | Path) -> None:
        by_main_process(lambda: method(obj, path))

    return on_main


# Hooks that replace hooks of SpeechBrain. SpeechBrain saves EpochCounterWithStopper without
# the best epoch, and does not recover InverseSquareRootScheduler.
REPAIRED_SAVE_HOOKS: dict[str | None, Hook] = {"stopper": _on_main(epoch_files.save_stopper)}
REPAIRED_LOAD_HOOKS: dict[str | None, Hook] = {
    "counter": epoch_files.load_counter,
    "stopper": epoch_files.load_stopper,
    "steps": epoch_files.load_steps,
}


def save_hook(obj: Any) -> Hook | None:
    """Returns the save hook of an object: the hook of its class, or its ``state_dict``.

    Args:
        obj: The object.
    """
    default = torch_save if hasattr(obj, "state_dict") else None
    return _registered(obj, DEFAULT_SAVE_HOOKS, REPAIRED_SAVE_HOOKS, "SAVE") or default


def load_hook(obj: Any) -> Hook | None:
    """Returns the load hook of an object: the hook of its class, or ``load_state_dict``.

    Args:
        obj: The object.
    """
    default = torch_recovery if hasattr(obj, "load_state_dict") else None
    return _registered(obj, DEFAULT_LOAD_HOOKS, REPAIRED_LOAD_HOOKS, "LOAD") or default


def _registered(
    obj: Any, ours: Mapping[type, Hook], repaired: Mapping[str | None, Hook], kind: str
) -> Hook | None:
    """Returns the hook of the object's class, or of its first base class with a hook."""
    theirs = default_hooks(kind)
    for cls in type(obj).__mro__:
        if hook := repaired.get(repaired_kind(cls)):
            return hook
        # SpeechBrain's hooks for torch's classes do the same, but may run code from the file.
        if cls in ours or (cls in theirs and not cls.__module__.startswith("torch.")):
            return ours.get(cls) or theirs[cls]
    return None


def mark_as_saver(method: Method) -> Method:
    """Marks the save method of a class, for ``register_checkpoint_hooks``.

    Args:
        method: Method with the argument ``path``.

    Raises:
        TypeError: The method has another signature.
    """
    return _marked(method, "_speechbrain_saver", "saver", "path")


def mark_as_loader(method: Method) -> Method:
    """Marks the load method of a class, for ``register_checkpoint_hooks``.

    Args:
        method: Method with the arguments ``path`` and ``end_of_epoch``. A method for
            SpeechBrain 0.5 also has the argument ``device``.

    Raises:
        TypeError: The method has another signature.
    """
    arguments = ("path", "end_of_epoch")
    return _marked(method, "_speechbrain_loader", "loader", *arguments, device=True)


def mark_as_transfer(method: Method) -> Method:
    """Marks the method that loads pretrained parameters, like SpeechBrain's decorator.

    Only SpeechBrain's ``Pretrainer`` calls this method.

    Args:
        method: Method with the argument ``path``. A method for SpeechBrain 0.5 also has the
            argument ``device``.

    Raises:
        TypeError: The method has another signature.
    """
    return _marked(method, "_speechbrain_transfer", "transfer hook", "path", device=True)


def _marked(
    method: Method, mark: str, kind: str, *arguments: str, device: bool = False
) -> Method:
    called_with = ("self", *arguments)
    if not binds(method, *called_with) and not (
        device and binds(method, *called_with, "device")
    ):
        raise TypeError(
            f"a checkpoint {kind} must have the signature ({', '.join(called_with)}), but "
            f"{method.__qualname__} has {inspect.signature(method)}"
        )
    setattr(method, mark, True)
    return method


def register_checkpoint_hooks(cls: Class, save_on_main_only: bool = True) -> Class:
    """Registers the marked methods of a class. Use it as a class decorator.

    If SpeechBrain is in use, the methods are also registered with SpeechBrain, for its
    Checkpointer and its Pretrainer.

    Args:
        cls: The class.
        save_on_main_only: Whether only rank 0 calls the save method. Set it to False if the
            method communicates with the other ranks.

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
    share_with_speechbrain()
    return cls


def share_with_speechbrain() -> None:
    """Registers the classes with SpeechBrain, if SpeechBrain is imported by now.

    A YAML file may import SpeechBrain after a class was registered here.
    """
    tables: dict[str, tuple[Mapping[type, Hook], Callable[[Hook], Hook]]] = {
        "SAVE": (DEFAULT_SAVE_HOOKS, lambda hook: hook),
        "LOAD": (DEFAULT_LOAD_HOOKS, lambda hook: without_device(hook, *LOAD_HOOK)),
        "TRANSFER": (
            DEFAULT_TRANSFER_HOOKS,
            lambda hook: without_device(hook, "self", "path"),
        ),
    }
    for kind, (ours, adapted) in tables.items():
        theirs = default_hooks(kind)
        for cls in ours.keys() - theirs.keys():
            # SpeechBrain has its own hooks for torch's classes.
            if cls not in STATEFUL:
                theirs[cls] = adapted(ours[cls])


def save_shards(temporary: TemporaryAttributes) -> None:
    """Makes SpeechBrain's Checkpointer, if it is in use, save and load sharded objects.

    SpeechBrain's own hooks call ``state_dict`` only on rank 0, but for sharded objects this
    call is collective.

    Args:
        temporary: Records the changes, to undo them later.
    """
    arounds: dict[str, Hook] = {"SAVE": _save_theirs, "LOAD": _load_theirs}
    for kind, around in arounds.items():
        theirs = default_hooks(kind)
        for cls, hook in list(theirs.items()):
            temporary.callback(theirs.__setitem__, cls, hook)
            theirs[cls] = functools.partial(around, hook)


class _FixedState:
    """An object whose ``state_dict`` returns a given state."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state_dict = lambda: state


def _save_theirs(hook: Hook, obj: Any, path: str | Path) -> None:
    savers = state_savers()
    if hook in savers and is_saved_together(obj):
        # The full state is on rank 0 only, and on no other node.
        savers[0](_FixedState(state_to_save(obj)), path)
        return
    with with_full_states(obj):
        hook(obj, path)


def _load_theirs(hook: Hook, obj: Any, path: str | Path, end_of_epoch: bool) -> None:
    save_full_optimizers([obj])
    hook(obj, path, end_of_epoch)
