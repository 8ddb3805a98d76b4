"""Collects the objects that a run saves and recovers."""

from __future__ import annotations

import time
from typing import Any

from torch import GradScaler, Tensor
from torch.nn import Module
from torch.optim import Optimizer

from brain_lightning.checkpoints.content import Content, content_of, load_content
from brain_lightning.checkpoints.hooks import load_hook, save_hook
from brain_lightning.checkpoints.recoverables import Recoverables
from brain_lightning.lightning_internals.trainer_callbacks import AVERAGES
from brain_lightning.protocol import BrainProtocol, hparams_of
from brain_lightning.resume.plain_values import State, plain_values
from brain_lightning.resume.run_state import KEY, RunState
from brain_lightning.stages.run import Run


def run_state(brain: BrainProtocol) -> RunState:
    """Returns the state of a new run, which is a recoverable of the Brain's Checkpointer.

    Args:
        brain: The Brain. It must not be in another run, whose state would be lost.

    Returns:
        The state object of the Brain's earlier runs after a reset, or a new object.
    """
    checkpointer = brain.checkpointer
    known = getattr(checkpointer, "recoverables", {}).get(KEY)
    if isinstance(known, RunState) and known.brain is brain:
        known.begin()
        return known
    new = RunState(brain)
    if hasattr(checkpointer, "add_recoverable"):
        hooks = (RunState.recover, RunState.save)
        checkpointer.add_recoverable(KEY, new, *hooks, optional_load=True)
    return new


def is_saved(run: Run) -> bool:
    """Whether the Brain's Checkpointer saves the state of this run; false in ``evaluate``.

    Args:
        run: The run.
    """
    return getattr(run.brain.checkpointer, "recoverables", {}).get(KEY) is run.run_state


def recoverables_of(run: Run) -> Recoverables:
    """Returns the recoverables of the Brain's Checkpointer and the state of the run.

    Without a Checkpointer, the attributes and hyperparameters of the Brain are searched.

    Args:
        run: The run.
    """
    brain = run.brain
    checkpointer = brain.checkpointer
    found: dict[str, Any] = {"brain": brain}
    if hasattr(checkpointer, "recoverables"):
        found |= checkpointer.recoverables
        # In Lightning's files the callbacks save their averages.
        found.pop(AVERAGES, None)
    else:
        hparams = hparams_of(brain)
        found |= {n: o for n, o in hparams.items() if _is_recoverable(o) and not _is_frozen(o)}
        found |= {n: o for n, o in vars(brain).items() if _is_recoverable(o)}
        # Each entry of modules is a separate recoverable.
        del found["modules"]
        if brain.scaler.is_enabled():
            found["scaler"] = brain.scaler
    known = {id(obj) for obj in found.values()}
    counter = run.epochs.counter
    if id(counter) not in known and load_hook(counter) is not None:
        found["epoch_counter"] = counter
    return Recoverables(
        {**found, KEY: run.run_state},
        {**getattr(checkpointer, "custom_load_hooks", {}), KEY: RunState.recover},
        {**getattr(checkpointer, "custom_save_hooks", {}), KEY: RunState.save},
        allow_partial_load=getattr(checkpointer, "allow_partial_load", False),
    )


def _is_recoverable(obj: object) -> bool:
    """Whether an object can be saved and recovered; a scaler is handled separately."""
    if isinstance(obj, (type, GradScaler)):
        return False
    return save_hook(obj) is not None and load_hook(obj) is not None


def _is_frozen(obj: object) -> bool:
    """Whether an object is a frozen module, such as a pretrained model in hparams."""
    return isinstance(obj, Module) and not any(p.requires_grad for p in obj.parameters())


def state_beside_weights(run: Run) -> Content:
    """Returns the states of all recoverables except modules, optimizers and the run state.

    Args:
        run: The run.

    Returns:
        The content as from ``content_of``, and the key ``groups``: for each optimizer's name,
        the options of its parameter groups, for example the learning rate.
    """
    meta = {"unixtime": time.time(), "end-of-epoch": False}
    groups = {
        name: [plain_values(_options(group)) for group in optimizer.param_groups]
        for name, optimizer in _optimizers(run).items()
    }
    return {**content_of(_beside_weights(run), meta), "groups": groups}


def recover_beside_weights(run: Run, content: Content) -> None:
    """Recovers the states from ``state_beside_weights``, except for optimizer options.

    Args:
        run: The run that starts.
        content: Return value of ``state_beside_weights``.
    """
    load_content(_beside_weights(run), content)


def recover_options(run: Run, groups: State) -> None:
    """Recovers the options of optimizers, after the Trainer has loaded their states.

    Args:
        run: The run that starts.
        groups: The entry ``groups`` from ``state_beside_weights``.
    """
    for name, optimizer in _optimizers(run).items():
        for group, saved in zip(optimizer.param_groups, groups.get(name, ()), strict=False):
            for option, value in saved.items():
                if isinstance(group[option], Tensor):
                    group[option].copy_(value)
                else:
                    group[option] = value


def _options(group: State) -> State:
    return {name: value for name, value in group.items() if name != "params"}


def _optimizers(run: Run) -> dict[str, Optimizer]:
    found = recoverables_of(run).recoverables.items()
    return {name: obj for name, obj in found if isinstance(obj, Optimizer)}


def _beside_weights(run: Run) -> Recoverables:
    objects = recoverables_of(run)
    for name, obj in list(objects.recoverables.items()):
        if isinstance(obj, (Module, Optimizer, RunState)):
            del objects.recoverables[name]
    return objects
