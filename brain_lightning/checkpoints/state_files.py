"""The files of objects with a ``state_dict``: written by torch, read without running code."""

from __future__ import annotations

import inspect
import logging
import pickle
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from brain_lightning.compat.versions import PLAIN_GLOBALS
from brain_lightning.errors import CheckpointError, UnsafeCheckpointError
from brain_lightning.fsdp2 import sharded_files
from brain_lightning.fsdp2.state_dict import as_shards
from brain_lightning.fsdp2.tensors import local
from brain_lightning.host_copy import on_host
from brain_lightning.step.pruning import prune_as_saved

logger = logging.getLogger(__name__)

# What the name of a recoverable's file ends in.
PARAMFILE_EXT = ".ckpt"
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
    """Writes a state, with its tensors on the CPU: it loads where there is no GPU.

    Args:
        state: Tensors and plain values.
        path: The file.

    Raises:
        OSError: It could not be written; torch has another error for each case.
    """
    try:
        torch.save(on_host(state), path)
    except RuntimeError as error:
        raise OSError(f"torch could not write {path}: {error}") from error


def write_shards(obj: Any, folder: Path) -> list[Path]:
    """Saves the ``state_dict`` of what is sharded, all processes together.

    Args:
        obj: A module or an optimizer.
        folder: Where each process writes its own shards to.

    Returns:
        The files that this process has written.

    Raises:
        OSError: A process could not write.
        UnsupportedError: The processes do not share the folder.
    """
    with as_shards():
        state = state_to_save(obj)
    return sharded_files.write(state, folder, write_state)


def is_in_shards(path: Path) -> bool:
    """Whether a recoverable was saved by ``write_shards``, to a folder.

    Args:
        path: What has the name of its file.
    """
    return (path / sharded_files.STRUCTURE).is_file()


def load_state(path: str | Path, obj: Any = None) -> dict[str, Any]:
    """Reads a ``state_dict`` without running anything that is in it.

    Args:
        path: The file, or the folder of one that is in shards.
        obj: What the state is for: where that is sharded, its shards are read from a folder,
            and nothing else.

    Returns:
        The state, on the CPU; keys that SpeechBrain has renamed have their new names.

    Raises:
        UnsafeCheckpointError: The file would run code.
        CheckpointError: The file is damaged; or would run code, which nobody can tell
            where it is no archive.
    """
    if is_in_shards(Path(path)):
        structure = load_state(Path(path, sharded_files.STRUCTURE))
        return sharded_files.read(structure, Path(path), obj)
    torch.serialization.add_safe_globals(PLAIN_GLOBALS)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # A file that was cut short is no archive any more.
        refusal = UnsafeCheckpointError if zipfile.is_zipfile(path) else CheckpointError
        raise refusal(
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
        prune_as_saved(obj, state)
        obj.load_state_dict(state, strict=True)
    else:
        obj.load_state_dict(state)


def mismatched(obj: Any, state: Any) -> list[str]:
    """The keys of those tensors of a module that have another shape in a file.

    Args:
        obj: Anything; what is no module has none.
        state: What ``load_state`` returned for it.
    """
    if not isinstance(obj, torch.nn.Module) or not isinstance(state, dict):
        return []
    own = obj.state_dict(keep_vars=True)
    return [
        key
        for key, value in state.items()
        if isinstance(value, Tensor)
        and isinstance(own.get(key), Tensor)
        and not is_lazy(own[key])
        and own[key].shape != value.shape
    ]


def torch_recovery(obj: Any, path: str | Path, end_of_epoch: bool) -> None:  # noqa: ARG001
    """Recovers what ``torch_save`` has saved.

    Args:
        obj: The object.
        path: The file.
        end_of_epoch: Of no importance here.
    """
    apply_state(obj, load_state(path))


def not_finite(objects: Mapping[str, Any]) -> list[str]:
    """Which objects have a parameter that is trained and not finite.

    Others may hold what they like. Of shards each process looks at its own.

    Args:
        objects: Anything by name; what is no module is finite.
    """
    sums: dict[torch.device, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, obj in objects.items():
        for tensor in _trained(obj):
            sums[tensor.device].append((name, torch.isfinite(tensor.sum())))
    suspicious: set[str] = set()
    for found in sums.values():
        # The host waits once for each device, and not once for each parameter.
        are_finite = torch.stack([is_finite for _, is_finite in found]).tolist()
        suspicious |= {
            name
            for (name, _), is_finite in zip(found, are_finite, strict=True)
            if not is_finite
        }
    # A sum is cheap, and may have overflowed.
    return [name for name in objects if name in suspicious and not _is_finite(objects[name])]


def _trained(obj: Any) -> Iterator[Tensor]:
    """The parameters that are trained, of a module; of shards, this process's part."""
    if not isinstance(obj, torch.nn.Module):
        return
    for parameter in obj.parameters():
        if parameter.requires_grad and not is_lazy(parameter):
            tensor = local(parameter.detach())
            # torch has no sum of 8-bit floats.
            yield tensor.float() if tensor.element_size() == 1 else tensor


def _is_finite(obj: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in _trained(obj))
