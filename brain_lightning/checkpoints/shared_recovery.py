"""All processes recover the first one's checkpoint, even from a disk that is its alone.

Where ranks list different checkpoints, or none, each would go on from a state of its own.
The files of the first rank's are sent to those that do not have the same.
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

# Loads a checkpoint, or skips it where it is damaged; the others are less important ones.
Load = Callable[[Any, list[Any]], bool]

NONE = "none"


@contextmanager
def recovers_together(checkpointer: Any) -> Iterator[None]:
    """Makes ``recover_if_possible`` of a Checkpointer one step of all processes.

    Args:
        checkpointer: Ours or SpeechBrain's; nothing happens to others, nor to None.

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
                "SpeechBrain's Checkpointer cannot read: use brain_lightning.Checkpointer, or "
                "make it whole with brain-lightning convert"
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
    """Recovers from the first rank's most important checkpoint that is intact.

    Args:
        found: The checkpoints of this process, the most important first.
        load: Loads one, or returns False where it is damaged.
        folder: Where the checkpoints of this process are.
        failure: Makes the error where none could be loaded, of the first rank's folder.

    Returns:
        The checkpoint; None where there is none.

    Raises:
        CheckpointError: The first rank has none, and another one does; or all of its own
            are damaged; or a process could not load what the others have loaded.
        RankMismatchError: Another process does not recover at all.
    """
    newest = compare("recovers a checkpoint", _newest(found))
    if newest[0] == NONE and any(each != NONE for each in newest):
        raise CheckpointError(
            f"rank 0 has no checkpoint, and others do ({by_rank(newest)}): start the "
            "processes so that rank 0 is where the checkpoints are, or copy them there, or "
            "move them away to start anew"
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
    """The error of a folder that has checkpoints, but none that could be loaded.

    Only what is damaged is called so, and all of them only where it is all of them.

    Args:
        folder: The folder.
        skipped: Why those that were asked for were skipped.
        listed: How many there are.
    """
    whole = [each for each in skipped if not isinstance(each, DamagedCheckpointError)]
    if whole:
        return whole[0]
    if listed > len(skipped) > 0:
        return CheckpointError(
            f"every checkpoint in {folder} that was asked for is damaged; there are "
            f"{listed - len(skipped)} that min_key, max_key or ckpt_predicate leaves out"
        )
    return CheckpointError(
        f"every checkpoint in {folder} is damaged: move them away to start anew"
    )


def has_damaged_only(folder: Path) -> bool:
    """Whether there are checkpoints, and not one of them can be read.

    Args:
        folder: The folder.
    """
    paths = filter(may_be_checkpoint, folder.iterdir())
    return any((path / METAFNAME).exists() for path in paths) and not saved_in(folder)


def _newest(found: Sequence[Any]) -> str:
    return found[0].path.name if found else NONE


def _recover(offered: Any, found: Sequence[Any], load: Load, folder: Path) -> Any:
    """Loads what the first rank offers; None where it is damaged."""
    name, content = ddp_broadcast(offered and (offered.path.name, _content(offered.path)))
    own = next((each for each in found if each.path.name == name), None)
    has_it = if_main_process() or (own is not None and _content(own.path) == content)
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
    """Whether a process lacks the first rank's checkpoint, which is logged."""
    best = _newest(found)
    own = best if has_it or best != name else f"another {name}"
    answers = compare("looks for the checkpoint of rank 0", (has_it, own))
    is_sent = not all(has for has, _ in answers)
    if is_sent and (if_main_process() or not has_it):
        logger.warning(
            "The processes have different checkpoints (%s): all recover %s of rank 0, which "
            "is sent to the others. Where all read one folder, nothing is sent.",
            by_rank([each for _, each in answers]),
            name,
        )
    return is_sent


def _on_all_ranks(load: Callable[[], Any]) -> Any:
    """What was loaded, once all have loaded it; None where the first rank found it damaged."""
    loaded, failure, outcome = None, None, "damaged"
    try:
        loaded = load()
        outcome = "damaged" if loaded is None else "recovered"
    except DamagedCheckpointError as error:
        logger.warning("A checkpoint is skipped: %s", error)
    except Exception as error:  # noqa: BLE001  raised below, once the others know
        failure, outcome = error, repr(error)
    outcomes = compare("has loaded a checkpoint", outcome)
    if outcomes[0] == "damaged":
        return None
    if failure is not None:
        raise failure
    if any(each != "recovered" for each in outcomes):
        raise CheckpointError(
            f"not every process could recover the checkpoint of rank 0 ({by_rank(outcomes)}): "
            "remove what is damaged where it is, and the processes start from what rank 0 has"
        )
    return loaded


# ------------------------------------------------------------------------ what is sent


def _content(directory: Path) -> str:
    """What a checkpoint holds, in a word; an empty one where it cannot be read."""
    digest = hashlib.sha256()
    try:
        known = integrity.checksums(directory)
        for path in _files(directory):
            name = str(path.relative_to(directory))
            digest.update(f"{name}\0".encode())
            # What is in a folder is shards, and too large to be read once more.
            is_known = name in known and path.parent != directory
            digest.update(repr(known[name]).encode() if is_known else _content_of_file(path))
    except Exception:  # noqa: BLE001  what is damaged makes zipfile raise almost anything
        return ""
    return digest.hexdigest()


def _content_of_file(path: Path) -> bytes:
    """Torch's files are zip archives, which hold a checksum of each of their parts."""
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
    """Sends a checkpoint to all other processes."""
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
    """Receives a checkpoint, and keeps it under a name; without a name nothing is written.

    Args:
        name: That of its directory.
        stack: Removes the copy when it is left.

    Returns:
        The copy.
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
            # The rest is still on its way.
            failure = error
    if failure is not None:
        raise CheckpointError(
            f"the checkpoint of rank 0 could not be written to {copy}: {failure}; set TMPDIR "
            "to a folder with more space"
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
    """The checkpoint as it is where rank 0 has it, for the copy goes away."""
    files = {name: path / file.name for name, file in checkpoint.paramfiles.items()}
    return Checkpoint(path, checkpoint.meta, files)
