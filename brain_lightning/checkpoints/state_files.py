"""Files of objects with a ``state_dict``: torch writes them, no code runs when reading."""

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

# Extension of the file of a recoverable.
PARAMFILE_EXT = ".ckpt"
# Old and new names of parameters in which SpeechBrain has corrected a typo.
KEYS_MAPPING = {
    ".mutihead_attn": ".multihead_attn",
    ".convs_intermedite": ".convs_intermediate",
}


def state_to_save(obj: Any) -> dict[str, Any]:
    """Returns the state that the default save hook writes.

    Args:
        obj: Object with a ``state_dict``.
    """
    state: dict[str, Any] = obj.state_dict()
    if not state:
        logger.warning("Saving an empty state_dict for %s.", type(obj).__name__)
    # References to methods cannot be pickled. CyclicLR has one in its state, and recreates it.
    unpicklable = {name for name, value in state.items() if inspect.ismethod(value)}
    unpicklable |= {"_scale_fn_ref"} & state.keys()
    # Returned unchanged if possible: the state of a module has the attribute _metadata, with
    # the version of each submodule, which a new dict would lose.
    return {n: v for n, v in state.items() if n not in unpicklable} if unpicklable else state


def torch_save(obj: Any, path: str | Path) -> None:
    """Saves the ``state_dict`` of a module, an optimizer or a scheduler.

    Args:
        obj: The object.
        path: Path of the file.
    """
    write_state(state_to_save(obj), path)


def write_state(state: Any, path: str | Path) -> None:
    """Writes a state with its tensors on the CPU, so that it loads without a GPU.

    Args:
        state: Tensors and plain values.
        path: Path of the file.

    Raises:
        OSError: The file could not be written. It replaces the RuntimeError of torch.
    """
    try:
        torch.save(on_host(state), path)
    except RuntimeError as error:
        raise OSError(f"torch could not write {path}: {error}") from error


def write_shards(obj: Any, folder: Path) -> list[Path]:
    """Saves the ``state_dict`` of a sharded object. The call is collective.

    Args:
        obj: A module or an optimizer.
        folder: Folder to which each rank writes its own shards.

    Returns:
        The files that this rank has written.

    Raises:
        OSError: A rank could not write.
        UnsupportedError: The ranks do not share the folder.
    """
    with as_shards():
        state = state_to_save(obj)
    return sharded_files.write(state, folder, write_state)


def is_in_shards(path: Path) -> bool:
    """Whether a recoverable was saved to a folder by ``write_shards``.

    Args:
        path: File or folder of the recoverable.
    """
    return (path / sharded_files.STRUCTURE).is_file()


def load_state(path: str | Path, obj: Any = None) -> dict[str, Any]:
    """Reads a ``state_dict`` without running code from the file.

    Args:
        path: Path of the file, or of the folder of a sharded state.
        obj: Object to load the state into. If it is sharded, only its shards are read from
            the folder.

    Returns:
        The state on the CPU. Keys that SpeechBrain has renamed have their new names.

    Raises:
        UnsafeCheckpointError: The file would run code.
        CheckpointError: The file is damaged. If it is not a zip archive, it may also be a
            file that would run code: the two cases cannot be distinguished.
    """
    if is_in_shards(Path(path)):
        structure = load_state(Path(path, sharded_files.STRUCTURE))
        return sharded_files.read(structure, Path(path), obj)
    torch.serialization.add_safe_globals(PLAIN_GLOBALS)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # A truncated file is no longer a zip archive.
        refusal = UnsafeCheckpointError if zipfile.is_zipfile(path) else CheckpointError
        raise refusal(
            f"{path} would run code when loaded, or is damaged. Only tensors and plain values "
            f"can be loaded ({str(error).splitlines()[0]})"
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
    """Loads a state into an object.

    Args:
        obj: Object with a ``load_state_dict``.
        state: Result of ``load_state``.
    """
    if isinstance(obj, torch.nn.Module):
        prune_as_saved(obj, state)
        obj.load_state_dict(state, strict=True)
    else:
        obj.load_state_dict(state)


def mismatched(obj: Any, state: Any) -> list[str]:
    """Returns the keys of a module's tensors that have another shape in a file.

    Args:
        obj: Any object. If it is not a module, the result is empty.
        state: Result of ``load_state`` for the object.
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
    """Recovers an object that ``torch_save`` has saved.

    Args:
        obj: The object.
        path: Path of the file.
        end_of_epoch: Not used.
    """
    apply_state(obj, load_state(path))


def not_finite(objects: Mapping[str, Any]) -> list[str]:
    """Returns the names of objects with a trainable parameter that is not finite.

    Frozen parameters are not checked. If a module is sharded, each rank checks its own shards.

    Args:
        objects: Objects by name. An object that is not a module counts as finite.
    """
    sums: dict[torch.device, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, obj in objects.items():
        for tensor in _trained(obj):
            sums[tensor.device].append((name, torch.isfinite(tensor.sum())))
    suspicious: set[str] = set()
    for found in sums.values():
        # The host waits once per device, not once per parameter.
        are_finite = torch.stack([is_finite for _, is_finite in found]).tolist()
        suspicious |= {
            name
            for (name, _), is_finite in zip(found, are_finite, strict=True)
            if not is_finite
        }
    # A sum is a cheap test but may overflow, so these objects are checked exactly.
    return [name for name in objects if name in suspicious and not _is_finite(objects[name])]


def _trained(obj: Any) -> Iterator[Tensor]:
    """Yields the trainable parameters of a module; for shards, the part of this rank."""
    if not isinstance(obj, torch.nn.Module):
        return
    for parameter in obj.parameters():
        if parameter.requires_grad and not is_lazy(parameter):
            tensor = local(parameter.detach())
            # torch cannot sum 8-bit floats.
            yield tensor.float() if tensor.element_size() == 1 else tensor


def _is_finite(obj: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in _trained(obj))
