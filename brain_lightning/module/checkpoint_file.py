"""Saves the states of a Brain in a Lightning ``.ckpt`` file, and recovers them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch.nn import Module
from torch.optim import Optimizer

from brain_lightning.callback.recoverables import recoverables_of
from brain_lightning.checkpoints.content import Content, content_of, load_content
from brain_lightning.checkpoints.recoverables import Recoverables
from brain_lightning.errors import CheckpointError
from brain_lightning.optimizers.active import all_optimizers
from brain_lightning.protocol import BrainProtocol
from brain_lightning.resume.run_state import KEY
from brain_lightning.stages.run import Run

MODULES = "brain_modules"


def content(run: Run, weights: Mapping[str, Any]) -> Content:
    """Returns the states to save, with the entries of a checkpoint directory.

    Args:
        run: The run.
        weights: The parameters and buffers of the module, not detached, by their names
            in the file.

    Returns:
        ``meta`` as YAML; ``modules`` and ``optimizers`` as references to entries that
        Lightning saves; ``states`` and ``files`` of all other recoverables by name. The dict
        is empty on ranks other than 0.
    """
    objects, saved_by_lightning = _split(run, weights)
    meta = {
        "unixtime": time.time(),
        "end-of-epoch": run.run_state.is_end_of_epoch,
        "epoch": run.epochs.current,
    }
    own = content_of(objects, meta)
    return own and {**saved_by_lightning, **own}


def recover(
    checkpoint: Content, run: Run, weights: Mapping[str, Any], strict: bool = True
) -> None:
    """Recovers everything except for the states that Lightning loads.

    Args:
        checkpoint: The content of the file. Its optimizers are renamed in place to the
            names in the Brain.
        run: The run that starts, after ``on_fit_start``.
        weights: As for ``content``.
        strict: Whether to raise if the file lacks a recoverable
            (``LightningModule.strict_loading``).

    Raises:
        CheckpointError: If the file lacks a recoverable, or has no states of a Brain.
    """
    own = checkpoint[KEY]
    objects, saved_by_lightning = _split(run, weights)
    _rename_optimizers(checkpoint, saved_by_lightning["optimizers"])
    objects.allow_partial_load |= not strict
    load_content(objects, own)
    run.run_state.explicit = True


def check_content(checkpoint: Content) -> None:
    """Raises if a run cannot be resumed from a file.

    Args:
        checkpoint: The content of the file.

    Raises:
        CheckpointError: If the file lacks the states of a Brain.
    """
    if KEY not in checkpoint:
        raise CheckpointError(
            "the checkpoint has only weights, or it is not a checkpoint of a Brain. To resume "
            "with fit(ckpt_path=...), use a file that a Trainer saved in the fit of a Brain, "
            "or that brain-lightning convert wrote. To load only weights, use "
            "load_from_checkpoint(path, brain=brain)."
        )


def _split(run: Run, weights: Mapping[str, Any]) -> tuple[Recoverables, Content]:
    """Returns the recoverables to save, and references to entries that Lightning saves."""
    objects = recoverables_of(run)
    modules = _modules(objects.recoverables, weights)
    optimizers = _optimizers(run.brain, objects.recoverables)
    for name in modules.keys() | optimizers.keys():
        del objects.recoverables[name]
    return objects, {"modules": modules, "optimizers": optimizers}


def _modules(recoverables: Mapping[str, Any], weights: Mapping[str, Any]) -> Content:
    """Returns references to the modules that Lightning saves, with their metadata."""
    names = {id(tensor): name for name, tensor in weights.items()}
    modules = {name: obj for name, obj in recoverables.items() if isinstance(obj, Module)}
    states = {name: module.state_dict(keep_vars=True) for name, module in modules.items()}
    return {
        name: {
            # The names of the tensors in the file.
            "keys": {key: names[id(tensor)] for key, tensor in state.items()},
            "metadata": dict(getattr(state, "_metadata", {})),
        }
        for name, state in states.items()
        if all(id(tensor) in names for tensor in state.values())
    }


def _optimizers(brain: BrainProtocol, recoverables: Mapping[str, Any]) -> dict[str, str]:
    """Returns the names in the Brain's optimizers, by the names of the recoverables."""
    members = {id(member): name for name, member in all_optimizers(brain).items()}
    return {
        name: members[id(obj)]
        for name, obj in recoverables.items()
        if isinstance(obj, Optimizer) and id(obj) in members
    }


def _rename_optimizers(checkpoint: Content, members: Mapping[str, str]) -> None:
    """Renames optimizers in a converted directory, where they have the recoverables' names."""
    for states in checkpoint["optimizer_states"]:
        for name, member in members.items():
            if name in states and member not in states:
                states[member] = states.pop(name)
