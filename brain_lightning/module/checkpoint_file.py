"""What a Lightning ``.ckpt`` holds of a Brain, beside its weights and optimizers."""

from __future__ import annotations

import tempfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import GradScaler
from torch.nn import Module
from torch.optim import Optimizer

from brain_lightning.checkpoints.checkpoint import checkpoint_in
from brain_lightning.checkpoints.hooks import load_hook, save_hook
from brain_lightning.checkpoints.integrity import CHECKSUMS
from brain_lightning.checkpoints.meta_file import METAFNAME, dump_meta
from brain_lightning.checkpoints.recoverables import Recoverables
from brain_lightning.checkpoints.state_files import PARAMFILE_EXT, load_state, write_state
from brain_lightning.distributed.communication import if_main_process
from brain_lightning.errors import CheckpointError
from brain_lightning.protocol import BrainProtocol, hparams_of
from brain_lightning.resume.run_state import KEY, RunState
from brain_lightning.stages.run import Run
from brain_lightning.step.optimizers import all_optimizers

Content = dict[str, Any]

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
    with tempfile.TemporaryDirectory() as folder:
        objects.write(Path(folder), None)
        if not if_main_process():
            return {}
        dump_meta(meta, Path(folder, METAFNAME))
        return {**saved_by_lightning, **read_files(Path(folder))}


def recover(checkpoint: Content, run: Run, weights: Mapping[str, Any]) -> None:
    """Recovers everything but what Lightning loads itself.

    Args:
        checkpoint: The content of the file, in which the optimizers are renamed as the
            Brain calls them.
        run: The run that begins, after ``on_fit_start``.
        weights: As for ``content``.

    Raises:
        CheckpointError: The file lacks something, or was not written of a Brain.
    """
    own = checkpoint[KEY]
    objects, saved_by_lightning = _split(run, weights)
    _rename_optimizers(checkpoint, saved_by_lightning["optimizers"])
    with tempfile.TemporaryDirectory() as folder:
        write_files(own, Path(folder))
        found = checkpoint_in(Path(folder))
        if found is None:
            raise CheckpointError("the checkpoint's meta cannot be read")
        files = objects.files_to_load(Path("the checkpoint"), found.paramfiles)
        objects.load(files, objects.read(files), found.meta["end-of-epoch"])
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
    objects = _recoverables(run)
    modules = _modules(objects.recoverables, weights)
    optimizers = _optimizers(run.brain, objects.recoverables)
    for name in modules.keys() | optimizers.keys():
        del objects.recoverables[name]
    return objects, {"modules": modules, "optimizers": optimizers}


def _recoverables(run: Run) -> Recoverables:
    """What the Brain's Checkpointer recovers; without one, every recoverable of the Brain."""
    brain = run.brain
    checkpointer = brain.checkpointer
    found: dict[str, Any] = {"brain": brain}
    if hasattr(checkpointer, "recoverables"):
        found |= checkpointer.recoverables
    else:
        hparams = hparams_of(brain)
        found |= {n: o for n, o in hparams.items() if _is_recoverable(o) and not _is_frozen(o)}
        found |= {n: o for n, o in vars(brain).items() if _is_recoverable(o)}
        # Each entry is one.
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
    """Also a module beside ``modules``, such as a teacher; not a scaler, which may be off."""
    if isinstance(obj, (type, GradScaler)):
        return False
    return save_hook(obj) is not None and load_hook(obj) is not None


def _is_frozen(obj: object) -> bool:
    """A pretrained model among the hyperparameters, which need not be saved."""
    return isinstance(obj, Module) and not any(p.requires_grad for p in obj.parameters())


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


def read_files(directory: Path) -> Content:
    """What a checkpoint directory holds.

    Args:
        directory: The directory.

    Returns:
        ``meta`` as text, so that nothing that YAML can express is lost; ``states`` by name,
        of files that torch can read safely; and the other ``files`` as they are.
    """
    states: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        state = _state_in(path) if name == f"{path.stem}{PARAMFILE_EXT}" else None
        if state is not None:
            states[path.stem] = state
        elif path.is_file() and name not in (METAFNAME, CHECKSUMS):
            files[name] = path.read_bytes()
    meta = (directory / METAFNAME).read_text(encoding="utf-8")
    return {"meta": meta, "states": states, "files": files}


def _state_in(path: Path) -> Any:
    try:
        return load_state(path) if zipfile.is_zipfile(path) else None
    except CheckpointError:
        # A hook of the recipe wrote it, and reads it.
        return None


def write_files(own: Content, folder: Path) -> None:
    """Writes what ``read_files`` has read.

    Args:
        own: ``meta``, ``states`` and ``files``, as far as they are there.
        folder: Where to write to.
    """
    if "meta" in own:
        (folder / METAFNAME).write_text(own["meta"], encoding="utf-8")
    for name, state in own.get("states", {}).items():
        write_state(state, folder / f"{name}{PARAMFILE_EXT}")
    for name, data in own.get("files", {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
