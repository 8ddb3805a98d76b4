"""Files to which each process writes its own shards (``torch.distributed.checkpoint``).

A state becomes a folder: ``structure.pt`` is the state with empty tensors where the shards
are, and the other files hold the shards by the place that each has in the state, such as
``state/0/exp_avg``. So any number of processes reads it, and one alone reads whole tensors.
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
# Where a tensor is in a state.
Place = tuple[Any, ...]
State = dict[str, Any]

# What ``torch.distributed.checkpoint`` pickles to say which file has which shard.
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
    # From Python 3.13 on.
    ("pathlib._local", "PosixPath"),
}  # fmt: skip


def check_is_shared(folder: Path) -> None:
    """Refuses a folder of the main process that is not there in the others.

    Args:
        folder: One that is new, the same in all processes.

    Raises:
        UnsupportedError: It is not on a file system that all share.
    """
    seen = gather(folder.is_dir())
    if not all(seen):
        words = by_rank(["found" if each else "not found" for each in seen])
        raise UnsupportedError(
            "FSDP2Strategy(sharded_checkpoints=True) needs a folder of checkpoints that all "
            f"processes share, and what rank 0 has in {folder.parent} others have not "
            f"({words}): put it on a shared file system, or leave sharded_checkpoints out"
        )


def write(
    state: State, folder: Path, write_structure: Callable[[State, Path], None]
) -> list[Path]:
    """Writes a state, all processes together; where one fails, all do.

    Args:
        state: With shards in it, of which each process writes its own.
        folder: Made in one that all processes share.
        write_structure: Writes a state without shards to a file.

    Returns:
        The files that this process has written.

    Raises:
        UnsupportedError: The processes share no file system, or one of them saves alone.
        OSError: A process could not write.
    """
    if not communicates():
        raise UnsupportedError(
            "a sharded module, or its optimizer, is saved to a sharded checkpoint by the main "
            "process alone, in run_on_main: save the checkpoint in all processes"
        )
    structure, shards = _split(state)

    def begin() -> None:
        if if_main_process():
            folder.mkdir()
            write_structure(structure, folder / STRUCTURE)

    collectively(begin)
    check_is_shared(folder)
    # A shard of 0 elements does not show that it is that of a tied weight.
    places = ddp_broadcast(list(shards))
    _write_shards(collectively(lambda: {place: shards[place] for place in places}), folder)
    own = list(folder.glob(f"__{rank()}_*"))
    return [*own, folder / ".metadata", folder / STRUCTURE] if if_main_process() else own


def _write_shards(shards: State, folder: Path) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(shards, storage_writer=FileSystemWriter(folder))
    except CheckpointException as error:
        # In all processes, and with the traceback of each: no subclass of Exception.
        first, (cause, _) = min(error.failures.items())
        raise OSError(f"rank {first} could not write its shards: {cause}") from error


def _split(state: State) -> tuple[State, State]:
    """The state with empty tensors for its shards, and the shards by their places."""
    shards: State = {}
    empty: dict[tuple[Any, ...], Tensor] = {}

    def without_shards(place: Place, value: Any) -> Any:
        if not is_shard(value):
            return value
        # Weights that are tied are one tensor.
        part = value.to_local()
        memory = (part.data_ptr(), part.dtype, tuple(value.shape), value.stride())
        if memory not in empty or not part.numel():
            shards[_name(place)] = value.detach()
            empty[memory] = torch.empty(value.shape, dtype=value.dtype, device="meta")
        return empty[memory]

    return _replaced(state, without_shards), shards


def read(structure: State, folder: Path, obj: Any = None) -> State:
    """Reads a state, without communication.

    Args:
        structure: What is in ``STRUCTURE``.
        folder: What ``write`` made.
        obj: What the state is for. Where its tensors are shards, so are those that are read.

    Returns:
        The state, other tensors of it whole and on the CPU.

    Raises:
        CheckpointError: A file cannot be read, or would run code.
        UnsupportedError: This version of torch cannot read it.
    """
    shard_at = _shards_of(obj, structure)
    found: State = {}
    taken: dict[int, Any] = {}

    def with_shards(place: Place, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        if id(value) in taken:
            return taken[id(value)].detach()
        own = shard_at(place)
        if is_shard(own) and own.shape == value.shape:
            taken[id(value)] = torch.empty_like(own, dtype=value.dtype, requires_grad=False)
        else:
            taken[id(value)] = torch.empty(value.shape, dtype=value.dtype)
        found[_name(place)] = taken[id(value)]
        return taken[id(value)]

    state: State = _replaced(structure, with_shards)
    if found:
        _read_shards(found, folder)
    return state


def _read_shards(found: State, folder: Path) -> None:
    if not SHARDS:
        raise UnsupportedError(
            f"{folder} was saved by FSDP2Strategy(sharded_checkpoints=True), and torch "
            f"{torch.__version__} cannot read it: it needs torch 2.8 or newer"
        )
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    metadata, reader = _read_metadata(folder / ".metadata"), FileSystemReader(folder)
    # Its own unpickles anything.
    vars(reader)["read_metadata"] = lambda *_, **__: metadata
    with warnings.catch_warnings():
        # It is read without communication.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            load(found, storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise CheckpointError(f"{folder} cannot be read: {cause}") from error


class _Unpickler(pickle.Unpickler):
    """Reads what ``torch.distributed.checkpoint`` has pickled, and runs nothing else."""

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


def _shards_of(obj: Any, structure: State) -> Callable[[Place], Any]:
    """Gives the tensor of an object, maybe a shard, that what is at a place is for."""
    if isinstance(obj, Module):
        own = obj.state_dict(keep_vars=True)
        return lambda place: own.get(place[0])
    if isinstance(obj, Optimizer):
        parameters = parameters_by_index(obj, structure)
        return lambda place: parameters.get(place[1])
    return lambda _: None


def _name(place: Place) -> str:
    return "/".join(map(str, place))


def _replaced(value: Any, replace: Callable[[Place, Any], Any], place: Place = ()) -> Any:
    """A copy of a state with other leaves; parts in which none changes are not copied."""
    if isinstance(value, Mapping):
        items = dict(value)
    elif isinstance(value, (list, tuple)):
        items = dict(enumerate(value))
    else:
        return replace(place, value)
    new = {name: _replaced(each, replace, (*place, name)) for name, each in items.items()}
    if all(new[name] is each for name, each in items.items()):
        return value
    if not isinstance(value, Mapping):
        return type(value)(new.values())
    # Modules keep the version of each part in an attribute of their state.
    copied: Any = copy.copy(value)
    copied.update(new)
    return copied
