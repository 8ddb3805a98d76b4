"""What a Lightning ``.ckpt`` holds of a Brain, beside its weights and optimizers."""

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
    """What there is to save, as a checkpoint directory would hold it.

    Args:
        run: The run.
        weights: The parameters and buffers of the module, not detached, by their names
            in the file.

    Returns:
        ``meta`` as YAML, ``modules`` and ``optimizers`` as references to what Lightning
        saves, ``states`` and ``files`` of everything else by name; empty on other than
        the main process.
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
    """Recovers everything but what Lightning loads itself.

    Args:
        checkpoint: The content of the file, in which the optimizers are renamed as the
            Brain calls them.
        run: The run that begins, after ``on_fit_start``.
        weights: As for ``content``.
        strict: Whether the file may not lack anything (``LightningModule.strict_loading``).

    Raises:
        CheckpointError: The file lacks something, or was not written of a Brain.
    """
    own = checkpoint[KEY]
    objects, saved_by_lightning = _split(run, weights)
    _rename_optimizers(checkpoint, saved_by_lightning["optimizers"])
    objects.allow_partial_load |= not strict
    load_content(objects, own)
    run.run_state.explicit = True


def check_content(checkpoint: Content) -> None:
    """Refuses a file from which a run cannot be resumed.

    Args:
        checkpoint: The content of the file.

    Raises:
        CheckpointError: It was saved without what a Brain needs.
    """
    if KEY not in checkpoint:
        raise CheckpointError(
            "the checkpoint holds weights alone, or is not of a Brain: fit(ckpt_path=...) "
            "resumes from what a Trainer saved of one, or brain-lightning convert wrote; "
            "weights alone come with load_from_checkpoint(path, brain=brain)"
        )


def _split(run: Run, weights: Mapping[str, Any]) -> tuple[Recoverables, Content]:
    """What is saved here; and the modules and optimizers, which Lightning saves."""
    objects = recoverables_of(run)
    modules = _modules(objects.recoverables, weights)
    optimizers = _optimizers(run.brain, objects.recoverables)
    for name in modules.keys() | optimizers.keys():
        del objects.recoverables[name]
    return objects, {"modules": modules, "optimizers": optimizers}


def _modules(recoverables: Mapping[str, Any], weights: Mapping[str, Any]) -> Content:
    """The recoverable modules that Lightning saves; each has the version of its parts."""
    names = {id(tensor): name for name, tensor in weights.items()}
    modules = {name: obj for name, obj in recoverables.items() if isinstance(obj, Module)}
    states = {name: module.state_dict(keep_vars=True) for name, module in modules.items()}
    return {
        name: {
            # The names that the tensors have in the file.
            "keys": {key: names[id(tensor)] for key, tensor in state.items()},
            "metadata": dict(getattr(state, "_metadata", {})),
        }
        for name, state in states.items()
        if all(id(tensor) in names for tensor in state.values())
    }


def _optimizers(brain: BrainProtocol, recoverables: Mapping[str, Any]) -> dict[str, str]:
    """The names that recoverable optimizers have among those that step together."""
    members = {id(member): name for name, member in all_optimizers(brain).items()}
    return {
        name: members[id(obj)]
        for name, obj in recoverables.items()
        if isinstance(obj, Optimizer) and id(obj) in members
    }


def _rename_optimizers(checkpoint: Content, members: Mapping[str, str]) -> None:
    """Renames them where the file is a converted directory, with the recoverables' names."""
    for states in checkpoint["optimizer_states"]:
        for name, member in members.items():
            if name in states and member not in states:
                states[member] = states.pop(name)
