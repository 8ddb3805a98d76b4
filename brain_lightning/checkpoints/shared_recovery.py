"""All ranks recover the checkpoint of rank 0, even if only rank 0 can read its disk.

If ranks found different checkpoints, or none, they would continue from different states.
Therefore rank 0 sends the files of its checkpoint to the ranks that do not have the same one.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from brain_lightning.compat import speechbrain
from brain_lightning.distributed.agreement import by_rank, compare
from brain_lightning.distributed.communication import (
    communicates,
    ddp_broadcast,
    if_main_process,
)
from brain_lightning.errors import CheckpointError, DamagedCheckpointError
from brain_lightning.temporary import TemporaryAttributes

from . import integrity
from .atomic_directory import may_be_checkpoint
from .checkpoint import Checkpoint, checkpoint_in, saved_in
from .meta_file import METAFNAME
from .state_files import is_in_shards

logger = logging.getLogger(__name__)

# Loads a checkpoint and returns True, or returns False if it is damaged. The second argument
# has the less important checkpoints.
Load = Callable[[Any, list[Any]], bool]

NONE = "none"


@contextmanager
def recovers_together(checkpointer: Any) -> Iterator[None]:
    """Makes ``recover_if_possible`` of a Checkpointer a collective call.

    Args:
        checkpointer: Checkpointer of brain_lightning or SpeechBrain. Any other object, or
            None, is not changed.

    Yields:
        None
    """
    with TemporaryAttributes() as temporary:
        if hasattr(checkpointer, "recovers_together"):
            temporary.override(checkpointer, "recovers_together", True)
        elif speechbrain.is_checkpointer(checkpointer):
            recover = partial(_recover_speechbrains, checkpointer)
            speechbrain.redirect_recovery(checkpointer, recover, temporary)
        yield


def _recover_speechbrains(checkpointer: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    if not communicates():
        return original(*args, **kwargs)

    def load(checkpoint: Any, _: list[Any]) -> bool:
        if any(map(is_in_shards, checkpoint.paramfiles.values())):
            raise CheckpointError(
                f"{checkpoint.path} was saved with sharded_checkpoints=True, which "
                "SpeechBrain's Checkpointer cannot read. Use brain_lightning.Checkpointer, or "
                "write a full checkpoint with brain-lightning convert."
            )
        checkpointer.load_checkpoint(checkpoint)
        return True

    found = checkpointer.find_checkpoints(*args, **kwargs)
    return recover_first_ranks(found, load, checkpointer.checkpoints_dir)


def recover_first_ranks(
    found: Sequence[Any],
    load: Load,
    folder: Path,
    failure: Callable[[Path], CheckpointError] | None = None,
) -> Any:
    """Recovers all ranks from the most important intact checkpoint of rank 0.

    Args:
        found: Checkpoints of this rank, the most important first.
        load: Loads a checkpoint, or returns False if it is damaged.
        folder: Folder with the checkpoints of this rank.
        failure: Creates the error if no checkpoint could be loaded. Its argument is the
            folder of rank 0.

    Returns:
        The checkpoint, or None if there is none.

    Raises:
        CheckpointError: Rank 0 has no checkpoint, but another rank has one. Or all
            checkpoints of rank 0 are damaged. Or one rank could not load a checkpoint that
            the other ranks have loaded.
        RankMismatchError: Another rank does not recover a checkpoint.
    """
    newest = compare("recovers a checkpoint", _newest(found))
    if newest[0] == NONE and any(each != NONE for each in newest):
        raise CheckpointError(
            f"rank 0 has no checkpoint, but other ranks do ({by_rank(newest)}). Start rank 0 "
            "on the machine with the checkpoints, or copy the checkpoints to the machine of "
            "rank 0. To start from scratch, move the checkpoints away."
        )
    count, first_folder = ddp_broadcast((len(found), folder))
    for position in range(count):
        offered = found[position] if if_main_process() else None
        checkpoint = _recover(offered, found, load, folder)
        if checkpoint is not None:
            return checkpoint
    if count:
        raise (failure or none_is_loaded)(first_folder)
    return None


def none_is_loaded(
    folder: Path, skipped: Sequence[CheckpointError] = (), listed: int = 0
) -> CheckpointError:
    """Returns the error for a folder whose checkpoints could not be loaded.

    The message calls a checkpoint damaged only if it is damaged. It says that all checkpoints
    are damaged only if that is true of all of them.

    Args:
        folder: The folder.
        skipped: Reason for each requested checkpoint that was skipped.
        listed: Number of checkpoints in the folder.
    """
    undamaged = [each for each in skipped if not isinstance(each, DamagedCheckpointError)]
    if undamaged:
        return undamaged[0]
    if listed > len(skipped) > 0:
        return CheckpointError(
            f"every requested checkpoint in {folder} is damaged. min_key, max_key or "
            f"ckpt_predicate leaves out {listed - len(skipped)} other checkpoints"
        )
    return CheckpointError(
        f"every checkpoint in {folder} is damaged. To start from scratch, move them away."
    )


def has_damaged_only(folder: Path) -> bool:
    """Whether a folder has checkpoints and none of them can be read.

    Args:
        folder: The folder.
    """
    paths = filter(may_be_checkpoint, folder.iterdir())
    return any((path / METAFNAME).exists() for path in paths) and not saved_in(folder)


def _newest(found: Sequence[Any]) -> str:
    return found[0].path.name if found else NONE


def _recover(offered: Any, found: Sequence[Any], load: Load, folder: Path) -> Any:
    """Loads the checkpoint that rank 0 offers. Returns None if it is damaged."""
    name, digest = ddp_broadcast(offered and (offered.path.name, _digest(offered.path)))
    own = next((each for each in found if each.path.name == name), None)
    has_it = if_main_process() or (own is not None and _digest(own.path) == digest)
    is_sent = _is_sent(name, has_it, found)
    others = list(found[found.index(own) + 1 :]) if own is not None else []
    with ExitStack() as stack:

        def load_here() -> Any:
            copy = None
            if is_sent and if_main_process():
                _send(offered.path)
            elif is_sent:
                copy = _receive(None if has_it else name, stack)
            checkpoint: Any = own if copy is None else _read(copy)
            if not load(checkpoint, others):
                return None
            return checkpoint if copy is None else _as_if_in(folder / name, checkpoint)

        return _on_all_ranks(load_here)


def _is_sent(name: str, has_it: bool, found: Sequence[Any]) -> bool:
    """Whether a rank lacks the checkpoint of rank 0. If so, logs a warning."""
    best = _newest(found)
    own = best if has_it or best != name else f"another {name}"
    answers = compare("looks for the checkpoint of rank 0", (has_it, own))
    is_sent = not all(has for has, _ in answers)
    if is_sent and (if_main_process() or not has_it):
        logger.warning(
            "The ranks have different checkpoints (%s). All ranks recover %s of rank 0, which "
            "sends it to the other ranks. To avoid this, let all ranks read the same folder.",
            by_rank([each for _, each in answers]),
            name,
        )
    return is_sent


def _on_all_ranks(load: Callable[[], Any]) -> Any:
    """Returns the loaded checkpoint when all ranks have loaded it; None if it is damaged."""
    loaded, failure, outcome = None, None, "damaged"
    try:
        loaded = load()
        outcome = "damaged" if loaded is None else "recovered"
    except DamagedCheckpointError as error:
        logger.warning("A checkpoint is skipped: %s", error)
    except Exception as error:  # noqa: BLE001  raised below, after the collective
        failure, outcome = error, repr(error)
    outcomes = compare("has loaded a checkpoint", outcome)
    if outcomes[0] == "damaged":
        return None
    if failure is not None:
        raise failure
    if any(each != "recovered" for each in outcomes):
        raise CheckpointError(
            f"not every rank could recover the checkpoint of rank 0 ({by_rank(outcomes)}). "
            "Remove the damaged copy on the ranks that failed, and start again: they then get "
            "the checkpoint from rank 0."
        )
    return loaded


# --------------------------------------------------------------- sending a checkpoint


def _digest(directory: Path) -> str:
    """Returns a digest of the content of a checkpoint; empty if it cannot be read."""
    digest = hashlib.sha256()
    try:
        known = integrity.checksums(directory)
        for path in _files(directory):
            name = str(path.relative_to(directory))
            digest.update(f"{name}\0".encode())
            # A file in a subfolder is a shard, and too large to be read once more.
            is_known = name in known and path.parent != directory
            digest.update(repr(known[name]).encode() if is_known else _digest_of_file(path))
    except Exception:  # noqa: BLE001  for a damaged file zipfile may raise anything
        return ""
    return digest.hexdigest()


def _digest_of_file(path: Path) -> bytes:
    """Returns a digest of a file. A torch file is a zip archive, which has checksums."""
    if integrity.is_archive(path):
        with zipfile.ZipFile(path) as archive:
            parts = [(each.filename, each.file_size, each.CRC) for each in archive.infolist()]
        return repr(parts).encode()
    digest = hashlib.sha256()
    for piece in integrity.pieces(path):
        digest.update(piece)
    return digest.digest()


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _send(directory: Path) -> None:
    """Sends a checkpoint to all other ranks."""
    try:
        integrity.check(directory)
        for path in _files(directory):
            for piece in integrity.pieces(path):
                ddp_broadcast((path.relative_to(directory).as_posix(), piece))
    except (CheckpointError, OSError) as error:
        ddp_broadcast(DamagedCheckpointError(str(error)))
        raise DamagedCheckpointError(str(error)) from error
    ddp_broadcast(None)


def _receive(name: str | None, stack: ExitStack) -> Path | None:
    """Receives a checkpoint from rank 0, and writes it to a temporary folder.

    Args:
        name: Name of the directory. If it is None, the checkpoint is not written.
        stack: Removes the copy when it is closed.

    Returns:
        The path of the copy, or None.
    """
    copy: Path | None = None
    failure: OSError | None = None
    while (received := ddp_broadcast(None)) is not None:
        if isinstance(received, DamagedCheckpointError):
            raise received
        if name is None or failure is not None:
            continue
        try:
            copy = copy or _new_copy(name, stack)
            _append(copy / received[0], received[1])
        except OSError as error:
            # Receive the remaining pieces all the same, because the broadcasts are collective.
            failure = error
    if failure is not None:
        raise CheckpointError(
            f"the checkpoint of rank 0 could not be written to {copy}: {failure}. Set TMPDIR "
            "to a folder with more space."
        ) from failure
    return copy


def _new_copy(name: str, stack: ExitStack) -> Path:
    folder = tempfile.TemporaryDirectory(prefix="brain_lightning_", ignore_cleanup_errors=True)
    return Path(stack.enter_context(folder), name)


def _append(path: Path, piece: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as content:
        content.write(piece)


def _read(copy: Path) -> Checkpoint:
    checkpoint = checkpoint_in(copy)
    if checkpoint is None:
        raise DamagedCheckpointError(f"the meta file of {copy.name} cannot be read")
    return checkpoint


def _as_if_in(path: Path, checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint with the path on rank 0, because the copy will be removed."""
    files = {name: path / file.name for name, file in checkpoint.paramfiles.items()}
    return Checkpoint(path, checkpoint.meta, files)
