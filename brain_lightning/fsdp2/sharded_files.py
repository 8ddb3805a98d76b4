"""Files to which each rank writes its own shards (``torch.distributed.checkpoint``).

A state is saved as a folder. ``structure.pt`` holds the state with empty tensors in place of
the shards. The other files hold the shards by their keys in the state, such as
``state/0/exp_avg``. Any number of ranks can read the folder, and a single process can read
full tensors from it.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from brain_lightning.compat.versions import SHARDS
from brain_lightning.distributed.agreement import by_rank
from brain_lightning.distributed.communication import (
    collectively,
    communicates,
    ddp_broadcast,
    gather,
    if_main_process,
    rank,
)
from brain_lightning.errors import CheckpointError, UnsafeCheckpointError, UnsupportedError

from .state_dict import parameters_by_index
from .tensors import is_shard

STRUCTURE = "structure.pt"
# The keys and indices that lead to a tensor in a state.
KeyPath = tuple[Any, ...]
State = dict[str, Any]

# Classes that ``torch.distributed.checkpoint`` pickles to record which file has which shard.
_DCP = "torch.distributed.checkpoint"
_SAFE_GLOBALS = {
    *((f"{_DCP}.metadata", name) for name in (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
        "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
    )),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    # Since Python 3.13.
    ("pathlib._local", "PosixPath"),
}  # fmt: skip


def check_is_shared(folder: Path) -> None:
    """Checks that all ranks see a folder that rank 0 has created.

    Args:
        folder: The new folder, with the same path on all ranks.

    Raises:
        UnsupportedError: A rank does not see it, so it is not on a shared file system.
    """
    seen = gather(folder.is_dir())
    if not all(seen):
        words = by_rank(["found" if each else "not found" for each in seen])
        raise UnsupportedError(
            "FSDP2Strategy(sharded_checkpoints=True) needs a checkpoint folder on a file "
            "system that all ranks share, and not all ranks see the files of rank 0 in "
            f"{folder.parent} ({words}). Use a shared file system, or remove "
            "sharded_checkpoints."
        )


def write(
    state: State, folder: Path, write_structure: Callable[[State, Path], None]
) -> list[Path]:
    """Writes a state, each rank its own shards. All ranks call it together.

    If one rank fails, all ranks raise.

    Args:
        state: State that contains shards.
        folder: Path of the folder to create, on a file system that all ranks share.
        write_structure: Function that writes a state without shards to a file.

    Returns:
        The files that this rank has written.

    Raises:
        UnsupportedError: The ranks share no file system, or only the main process saves.
        OSError: A rank could not write.
    """
    if not communicates():
        raise UnsupportedError(
            "a sharded checkpoint of a sharded module, or of its optimizer, is saved on rank "
            "0 only, in run_on_main. Save the checkpoint on all ranks."
        )
    structure, shards = _split(state)

    def begin() -> None:
        if if_main_process():
            folder.mkdir()
            write_structure(structure, folder / STRUCTURE)

    collectively(begin)
    check_is_shared(folder)
    # A rank whose shard has no elements cannot tell that the weight is tied.
    key_paths = ddp_broadcast(list(shards))
    _write_shards(
        collectively(lambda: {key_path: shards[key_path] for key_path in key_paths}), folder
    )
    own = list(folder.glob(f"__{rank()}_*"))
    return [*own, folder / ".metadata", folder / STRUCTURE] if if_main_process() else own


def _write_shards(shards: State, folder: Path) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(shards, storage_writer=FileSystemWriter(folder))
    except CheckpointException as error:
        # All ranks raise CheckpointException, which is not a subclass of Exception.
        first, (cause, _) = min(error.failures.items())
        raise OSError(f"rank {first} could not write its shards: {cause}") from error


def _split(state: State) -> tuple[State, State]:
    """Returns the state with empty tensors in place of its shards, and the shards by name."""
    shards: State = {}
    empty: dict[tuple[Any, ...], Tensor] = {}

    def without_shards(key_path: KeyPath, value: Any) -> Any:
        if not is_shard(value):
            return value
        # Tied weights are represented by the same empty tensor.
        part = value.to_local()
        memory = (part.data_ptr(), part.dtype, tuple(value.shape), value.stride())
        if memory not in empty or not part.numel():
            shards[_name(key_path)] = value.detach()
            empty[memory] = torch.empty(value.shape, dtype=value.dtype, device="meta")
        return empty[memory]

    return _replaced(state, without_shards), shards


def read(structure: State, folder: Path, obj: Any = None) -> State:
    """Reads a state, without communication.

    Args:
        structure: Content of the file ``STRUCTURE``.
        folder: Folder that ``write`` created.
        obj: Object that will load the state. If a tensor of the object is a shard, the tensor
            in the state is a shard too.

    Returns:
        The state. Its other tensors are full tensors on the CPU.

    Raises:
        CheckpointError: A file cannot be read, or would run code.
        UnsupportedError: This version of torch cannot read the files.
    """
    shard_at = _shards_of(obj, structure)
    found: State = {}
    taken: dict[int, Any] = {}

    def with_shards(key_path: KeyPath, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        if id(value) in taken:
            return taken[id(value)].detach()
        own = shard_at(key_path)
        if is_shard(own) and own.shape == value.shape:
            taken[id(value)] = torch.empty_like(own, dtype=value.dtype, requires_grad=False)
        else:
            taken[id(value)] = torch.empty(value.shape, dtype=value.dtype)
        found[_name(key_path)] = taken[id(value)]
        return taken[id(value)]

    state: State = _replaced(structure, with_shards)
    if found:
        _read_shards(found, folder)
    return state


def _read_shards(found: State, folder: Path) -> None:
    if not SHARDS:
        raise UnsupportedError(
            f"{folder} was saved with FSDP2Strategy(sharded_checkpoints=True), and torch "
            f"{torch.__version__} cannot read it. Use torch 2.8 or newer."
        )
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    metadata, reader = _read_metadata(folder / ".metadata"), FileSystemReader(folder)
    # FileSystemReader.read_metadata would unpickle any class.
    vars(reader)["read_metadata"] = lambda *_, **__: metadata
    with warnings.catch_warnings():
        # The files are read without collectives on purpose.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            load(found, storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise CheckpointError(f"{folder} cannot be read: {cause}") from error


class _Unpickler(pickle.Unpickler):
    """Unpickles only the classes that ``torch.distributed.checkpoint`` saves."""

    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_type or (module, name) in _SAFE_GLOBALS:
            return super().find_class(module, name)
        raise UnsafeCheckpointError(f"it would run {module}.{name}")


def _read_metadata(path: Path) -> Any:
    try:
        with path.open("rb") as content:
            return _Unpickler(content).load()
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(f"{path} would run code when loaded: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _shards_of(obj: Any, structure: State) -> Callable[[KeyPath], Any]:
    """Returns a function from key paths in a state to tensors of the object that loads it."""
    if isinstance(obj, Module):
        own = obj.state_dict(keep_vars=True)
        return lambda key_path: own.get(key_path[0])
    if isinstance(obj, Optimizer):
        parameters = parameters_by_index(obj, structure)
        return lambda key_path: parameters.get(key_path[1])
    return lambda _: None


def _name(key_path: KeyPath) -> str:
    return "/".join(map(str, key_path))


def _replaced(
    value: Any, replace: Callable[[KeyPath, Any], Any], key_path: KeyPath = ()
) -> Any:
    """Returns a state with replaced leaves, and copies only containers that change."""
    if isinstance(value, Mapping):
        items = dict(value)
    elif isinstance(value, (list, tuple)):
        items = dict(enumerate(value))
    else:
        return replace(key_path, value)
    new = {name: _replaced(each, replace, (*key_path, name)) for name, each in items.items()}
    if all(new[name] is each for name, each in items.items()):
        return value
    if not isinstance(value, Mapping):
        return type(value)(new.values())
    # Copied, because the state of a module has a _metadata attribute with versions.
    copied: Any = copy.copy(value)
    copied.update(new)
    return copied
