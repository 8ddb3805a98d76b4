"""Saving and recovering an experiment: SpeechBrain's Checkpointer, its saves whole."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from brain_lightning.compat.load_hooks import loading_to
from brain_lightning.distributed.communication import (
    collectively,
    communicates,
    ddp_broadcast,
    gather,
    if_main_process,
)
from brain_lightning.errors import (
    CheckpointError,
    DamagedCheckpointError,
    NotInCheckpointError,
    UnsafeCheckpointError,
)

from . import atomic_directory, integrity
from .async_save import StateCopies, run_in_background
from .checkpoint import Checkpoint, Key, Predicate, Ranking, ckpt_recency, saved_in
from .hooks import Hook
from .meta_file import METAFNAME, dump_meta
from .recoverables import Recoverables
from .shared_recovery import has_damaged_only, none_is_loaded, recover_first_ranks
from .state_files import PARAMFILE_EXT, write_state

logger = logging.getLogger(__name__)


class Checkpointer(Recoverables):
    """Saves recoverables by name, and recovers them (``speechbrain...Checkpointer``).

    On disk as SpeechBrain's: each side loads the other's. A save is there whole or
    not at all; a damaged checkpoint is skipped with a warning for the one before.

    Args:
        checkpoints_dir: Where checkpoints are; made if it is not there.
        recoverables: Objects by name.
        custom_load_hooks: By name, each called with the object, the path, and whether
            it was the end of an epoch.
        custom_save_hooks: By name, each called with the object and the path.
        allow_partial_load: Whether a checkpoint may lack a recoverable.
        ignore_mismatched_sizes: See ``Recoverables``.

    Attributes:
        async_save: Whether tensors are written in the background.
        recovers_together: Whether all processes recover at this moment, each the
            checkpoint of the first.
    """

    recovers_together = False

    def __init__(
        self,
        checkpoints_dir: str | os.PathLike[str],
        recoverables: Mapping[str, Any] | None = None,
        custom_load_hooks: Mapping[str, Hook] | None = None,
        custom_save_hooks: Mapping[str, Hook] | None = None,
        allow_partial_load: bool = False,
        ignore_mismatched_sizes: Collection[str] = (),
    ) -> None:
        super().__init__(
            recoverables, custom_load_hooks, custom_save_hooks, allow_partial_load
        )
        self.ignore_mismatched_sizes = ignore_mismatched_sizes
        # Absolute: a script may change directory before a save is done.
        self.checkpoints_dir = Path(checkpoints_dir).absolute()
        self.async_save = False
        # The save that runs in the background.
        self._pending: Future[Any] | None = None
        self._copies = StateCopies()
        self._newest = 0.0
        self._names: set[str] = set()
        # What this process has written, or has read and found intact.
        self._intact: set[Path] = set()
        os.makedirs(self.checkpoints_dir, exist_ok=True)
        if if_main_process():
            atomic_directory.clean_up(self.checkpoints_dir)

    # ------------------------------------------------------------------- saving

    def save_checkpoint(
        self,
        meta: Mapping[str, Any] = {},
        end_of_epoch: bool = True,
        name: str | None = None,
        verbosity: int = logging.INFO,
    ) -> Checkpoint | None:
        """Saves every recoverable.

        Args:
            meta: Values to save in the checkpoint's meta file, for choosing among checkpoints.
            end_of_epoch: Whether an epoch has ended; what is recovered may depend on it.
            name: A name instead of time and number; a checkpoint that has it is replaced.
            verbosity: The level of the log message.

        Returns:
            The checkpoint, on the main process. None on the others, and where a
            parameter is not finite: such a state is not saved beside a good one.

        Raises:
            CheckpointSaveError: It could not be written, or, in the background, the
                one before.
            CheckpointError: A recoverable has no way to be saved.
        """
        return self._save(meta, end_of_epoch, name, verbosity, lambda: None)

    def save_and_keep_only(
        self,
        meta: Mapping[str, Any] = {},
        end_of_epoch: bool = True,
        name: str | None = None,
        num_to_keep: int = 1,
        keep_recent: bool = True,
        importance_keys: Sequence[Key] = (),
        max_keys: Sequence[str] = (),
        min_keys: Sequence[str] = (),
        ckpt_predicate: Predicate | None = None,
        verbosity: int = logging.INFO,
    ) -> None:
        """Saves, and once that is durable deletes the least important checkpoints.

        Args:
            meta: See ``save_checkpoint``.
            end_of_epoch: See ``save_checkpoint``.
            name: See ``save_checkpoint``.
            num_to_keep: How many to keep by each key.
            keep_recent: Whether recency is one of the keys.
            importance_keys: Functions of a checkpoint; the highest values are kept.
            max_keys: Names in ``meta`` of which the highest values are kept.
            min_keys: Names in ``meta`` of which the lowest values are kept.
            ckpt_predicate: Only those for which it is true are considered at all.
            verbosity: The level of the log messages.
        """
        keys = [*importance_keys, *([ckpt_recency] if keep_recent else [])]
        rankings = Ranking.by_each(keys, max_keys or (), min_keys or ())

        def delete_others() -> None:
            self._delete(num_to_keep, rankings, ckpt_predicate, verbosity)

        self._save(meta, end_of_epoch, name, verbosity, delete_others)

    def _save(
        self,
        meta: Mapping[str, Any],
        end_of_epoch: bool,
        name: str | None,
        verbosity: int,
        afterwards: Callable[[], None],
    ) -> Checkpoint | None:
        collectively(self.wait)
        if not all(gather(collectively(self.may_be_saved))):
            return None
        begun = collectively(lambda: self._begin(meta, end_of_epoch, name))
        directory, saved = ddp_broadcast(begun)
        deferred = self._write(directory)
        publish = atomic_directory.publish if name is None else atomic_directory.replace

        def finish() -> Checkpoint:
            with atomic_directory.removed_on_failure(directory):
                self._copies.wait()
                for path, state in deferred.items():
                    write_state(state, path)
                self._copies.recycle()
                path = publish(directory, saved.path)
            kind = "end-of-epoch" if end_of_epoch else "intra-epoch"
            logger.log(verbosity, "Saved an %s checkpoint in %s", kind, path)
            self._intact.add(path)
            afterwards()
            files = {name: path / file.name for name, file in saved.paramfiles.items()}
            return Checkpoint(path, saved.meta, files)

        if not self.async_save:
            return collectively(lambda: finish() if if_main_process() else None)
        if not if_main_process():
            return None
        self._pending = run_in_background(finish)
        return saved  # type: ignore[no-any-return]

    def _write(self, directory: Path) -> dict[Path, Any]:
        copies = self._copies if self.async_save else None
        with ExitStack() as stack:
            if if_main_process():
                stack.enter_context(atomic_directory.removed_on_failure(directory))
                if not self.async_save:
                    stack.enter_context(atomic_directory.syncing(directory))
            return collectively(lambda: self.write(directory, copies))

    def _begin(
        self, meta: Mapping[str, Any], end_of_epoch: bool, name: str | None
    ) -> tuple[Path, Checkpoint] | None:
        """The directory to write to, with the meta file in it, on the main process."""
        if not if_main_process():
            return None
        if name is not None and Path(name).name != name:
            raise CheckpointError(
                f"name={name!r} is no name of a directory: leave out {os.sep}"
            )
        # A clock that was set back must not make the newest checkpoint an old one.
        listed = saved_in(self.checkpoints_dir)
        newest = max([self._newest, *(ckpt.meta["unixtime"] for ckpt in listed)])
        self._newest = max(time.time(), newest + 1e-3)
        final = self._path(name or self._unused_name())
        directory = atomic_directory.new_directory(self.checkpoints_dir)
        saved_meta = {"unixtime": self._newest, "end-of-epoch": end_of_epoch, **meta}
        with atomic_directory.removed_on_failure(directory):
            saved_meta = dump_meta(saved_meta, directory / METAFNAME)
        files = {n: final / f"{n}{PARAMFILE_EXT}" for n in self.recoverables}
        return directory, Checkpoint(final, saved_meta, files)

    def _path(self, name: str) -> Path:
        return self.checkpoints_dir / f"{atomic_directory.CKPT_PREFIX}+{name}"

    def _unused_name(self) -> str:
        stamp = time.strftime("%Y-%m-%d+%H-%M-%S")
        names = (f"{stamp}+{number:02d}" for number in itertools.count())
        # One that is written in the background has no directory yet.
        name = next(n for n in names if n not in self._names and not self._path(n).exists())
        self._names.add(name)
        return name

    def wait(self) -> None:
        """Waits until every save is durable.

        Raises:
            CheckpointSaveError: One of them could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    # -------------------------------------------------------- finding and recovering

    def find_checkpoint(
        self,
        importance_key: Key | None = None,
        max_key: str | None = None,
        min_key: str | None = None,
        ckpt_predicate: Predicate | None = None,
    ) -> Checkpoint | None:
        """The most important checkpoint, by default the newest.

        Args:
            importance_key: The highest value counts.
            max_key: A name in ``meta``; the highest value counts.
            min_key: A name in ``meta``; the lowest value counts.
            ckpt_predicate: Only those for which it is true are considered.

        Returns:
            The checkpoint, or None where there is none.
        """
        found = self.find_checkpoints(importance_key, max_key, min_key, ckpt_predicate, 1)
        return found[0] if found else None

    def find_checkpoints(
        self,
        importance_key: Key | None = None,
        max_key: str | None = None,
        min_key: str | None = None,
        ckpt_predicate: Predicate | None = None,
        max_num_checkpoints: int | None = None,
    ) -> list[Checkpoint]:
        """Checkpoints by importance, the most important first.

        Args:
            importance_key: See ``find_checkpoint``.
            max_key: See ``find_checkpoint``.
            min_key: See ``find_checkpoint``.
            ckpt_predicate: See ``find_checkpoint``.
            max_num_checkpoints: At most so many; None for all.

        Returns:
            The checkpoints; of two that are as important the newer comes first.

        Raises:
            ValueError: More than one key was given.
        """
        listed = self.list_checkpoints()
        ranking = Ranking.by_one(importance_key, max_key, min_key)
        return ranking.ranked(listed, ckpt_predicate)[:max_num_checkpoints]

    def recover_if_possible(
        self,
        importance_key: Key | None = None,
        max_key: str | None = None,
        min_key: str | None = None,
        ckpt_predicate: Predicate | None = None,
        device: Any = None,
    ) -> Checkpoint | None:
        """Recovers from the most important checkpoint that is intact.

        Args:
            importance_key: See ``find_checkpoint``.
            max_key: See ``find_checkpoint``.
            min_key: See ``find_checkpoint``.
            ckpt_predicate: See ``find_checkpoint``.
            device: See ``load_checkpoint``.

        Returns:
            The checkpoint, or None where there is none.

        Raises:
            CheckpointError: There are some, but each is damaged, or would run code.
        """
        found = self.find_checkpoints(importance_key, max_key, min_key, ckpt_predicate)
        skipped: list[CheckpointError] = []

        def load(checkpoint: Checkpoint, others: list[Checkpoint]) -> bool:
            with loading_to(device):
                skipped.extend(reasons := self._load_unless_damaged(checkpoint, others))
            return not reasons

        def failure(folder: Path) -> CheckpointError:
            return none_is_loaded(folder, skipped, len(self.list_checkpoints()))

        together = self.recovers_together and communicates()
        if together:
            recovered = recover_first_ranks(found, load, self.checkpoints_dir, failure)
        else:
            recovered = next((c for i, c in enumerate(found) if load(c, found[i + 1 :])), None)
        if recovered is not None:
            return recovered  # type: ignore[no-any-return]
        failed = found or has_damaged_only(self.checkpoints_dir)
        damaged = self.checkpoints_dir if failed else None
        if together:
            damaged = ddp_broadcast(damaged)
        if damaged is not None:
            raise failure(damaged)
        logger.info("Would load a checkpoint here, but none found yet.")
        return None

    def _load_unless_damaged(
        self, checkpoint: Checkpoint, others: list[Checkpoint]
    ) -> list[CheckpointError]:
        """Returns why a checkpoint was skipped for the others; nothing where it is loaded."""
        try:
            self.load_checkpoint(checkpoint)
        except (DamagedCheckpointError, UnsafeCheckpointError, NotInCheckpointError) as error:
            # SpeechBrain, killed in a save, leaves a checkpoint without some of its files.
            whole = any(self.recoverables.keys() <= each.paramfiles.keys() for each in others)
            cut_short = whole and not integrity.has_checksums(checkpoint.path)
            if isinstance(error, NotInCheckpointError) and not cut_short:
                raise
            logger.warning("%s is skipped: %s", checkpoint.path, error)
            return [error]
        return []

    def load_checkpoint(self, checkpoint: Checkpoint, device: Any = None) -> None:
        """Recovers every recoverable, once the whole checkpoint was read and checked.

        Args:
            checkpoint: The checkpoint. An error of a load hook has a note of its object.
            device: For load hooks that take one (SpeechBrain 0.5); by default the Brain's.

        Raises:
            DamagedCheckpointError: A file is not as it was saved.
            UnsafeCheckpointError: A file would run code.
            CheckpointError: A recoverable is not in it, or has no way to be recovered.
        """
        try:
            integrity.check(checkpoint.path)
            found = self.read(checkpoint.paramfiles)
        except (CheckpointError, OSError) as error:
            if isinstance(error, UnsafeCheckpointError):
                raise
            raise DamagedCheckpointError(str(error)) from error
        files = self.files_to_load(checkpoint.path, checkpoint.paramfiles)
        logger.info("Loading a checkpoint from %s", checkpoint.path)
        checked = integrity.has_checksums(checkpoint.path)
        with loading_to(device):
            self.load(files, found, checkpoint.meta["end-of-epoch"], checked)

    _remedy = Recoverables.remedy_by_name

    def list_checkpoints(self) -> list[Checkpoint]:
        """Every checkpoint, in no order; one whose meta cannot be read is left out."""
        self.wait()
        return saved_in(self.checkpoints_dir)

    # ------------------------------------------------------------------- deleting

    def delete_checkpoints(
        self,
        *,
        num_to_keep: int = 1,
        min_keys: Sequence[str] | None = None,
        max_keys: Sequence[str] | None = None,
        importance_keys: Sequence[Key] = (ckpt_recency,),
        ckpt_predicate: Predicate | None = None,
        verbosity: int = logging.INFO,
    ) -> None:
        """Deletes the least important checkpoints.

        Args:
            num_to_keep: How many to keep by each key.
            min_keys: See ``save_and_keep_only``.
            max_keys: See ``save_and_keep_only``.
            importance_keys: See ``save_and_keep_only``.
            ckpt_predicate: See ``save_and_keep_only``.
            verbosity: The level of the log messages.

        Raises:
            ValueError: ``num_to_keep`` is negative.
        """
        collectively(self.wait)
        rankings = Ranking.by_each(importance_keys, max_keys or (), min_keys or ())
        collectively(lambda: self._delete(num_to_keep, rankings, ckpt_predicate, verbosity))

    def _delete(
        self,
        num_to_keep: int,
        rankings: Iterable[Ranking],
        ckpt_predicate: Predicate | None,
        verbosity: int,
    ) -> None:
        if num_to_keep < 0:
            raise ValueError(f"num_to_keep={num_to_keep}: keep 0 or more checkpoints")
        if not if_main_process():
            return
        listed = saved_in(self.checkpoints_dir)
        considered = [ranking.ranked(listed, ckpt_predicate) for ranking in rankings]
        # One that is damaged must not be kept instead of a good one.
        intact = [filter(self._is_intact, each) for each in considered]
        kept = {ckpt for each in intact for ckpt in itertools.islice(each, num_to_keep)}
        for checkpoint in set(itertools.chain(*considered)) - kept:
            atomic_directory.delete(checkpoint.path)
            logger.log(verbosity, "Deleted checkpoint in %s", checkpoint.path)

    def _is_intact(self, checkpoint: Checkpoint) -> bool:
        """Reads a checkpoint once; after that looks only at the lengths of its files."""
        check = integrity.check_sizes if checkpoint.path in self._intact else integrity.check
        try:
            check(checkpoint.path)
        except (CheckpointError, OSError):
            return False
        self._intact.add(checkpoint.path)
        return True
