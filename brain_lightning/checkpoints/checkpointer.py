"""Saves and recovers an experiment: SpeechBrain's Checkpointer with atomic saves."""

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
    """Saves and recovers objects by name (``speechbrain.utils.checkpoints.Checkpointer``).

    SpeechBrain and brain_lightning can load each other's checkpoints. A save is atomic. If
    the newest checkpoint is damaged, a warning is logged and the previous one is recovered.

    Args:
        checkpoints_dir: Folder of the checkpoints. It is created if it does not exist.
        recoverables: See ``Recoverables``.
        custom_load_hooks: See ``Recoverables``.
        custom_save_hooks: See ``Recoverables``.
        allow_partial_load: See ``Recoverables``.
        ignore_mismatched_sizes: See ``Recoverables``.

    Attributes:
        async_save: Whether tensors are written in the background.
        recovers_together: Whether all ranks call ``recover_if_possible`` at the same time, to
            recover the checkpoint of rank 0.
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
        # Absolute, because a script may change the working directory before a save ends.
        self.checkpoints_dir = Path(checkpoints_dir).absolute()
        self.async_save = False
        # Save that is running in the background.
        self._pending: Future[Any] | None = None
        self._copies = StateCopies()
        self._newest = 0.0
        self._names: set[str] = set()
        # Checkpoints that this process has written or verified.
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
            meta: Values for the meta file, by which checkpoints can be ranked.
            end_of_epoch: Whether an epoch has ended. Load hooks get this value.
            name: Name instead of time and number. A checkpoint with this name is replaced.
            verbosity: Level of the log message.

        Returns:
            The checkpoint, on rank 0. None on the other ranks. None on all ranks, without a
            save, if a parameter is not finite.

        Raises:
            CheckpointSaveError: The checkpoint could not be written. If ``async_save`` is
                set: the previous checkpoint could not be written.
            CheckpointError: A recoverable has no save hook.
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
        """Saves a checkpoint, and then deletes the least important checkpoints.

        Args:
            meta: See ``save_checkpoint``.
            end_of_epoch: See ``save_checkpoint``.
            name: See ``save_checkpoint``.
            num_to_keep: Number of checkpoints to keep for each key.
            keep_recent: Whether recency is one of the keys.
            importance_keys: Functions of a checkpoint. The highest values are kept.
            max_keys: Names in ``meta``. The highest values are kept.
            min_keys: Names in ``meta``. The lowest values are kept.
            ckpt_predicate: Only checkpoints for which it is true are considered.
            verbosity: Level of the log messages.
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
        """Creates the directory to write to, with the meta file, on rank 0."""
        if not if_main_process():
            return None
        if name is not None and Path(name).name != name:
            raise CheckpointError(
                f"name={name!r} is not the name of a directory. Remove {os.sep!r}"
            )
        # The new checkpoint must be the newest one even if the clock was set back.
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
        # A name is also in use by a save in the background, which has no directory yet.
        name = next(n for n in names if n not in self._names and not self._path(n).exists())
        self._names.add(name)
        return name

    def wait(self) -> None:
        """Waits until the save in the background has ended.

        Raises:
            CheckpointSaveError: The checkpoint could not be written.
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
        """Finds the most important checkpoint, by default the newest.

        Args:
            importance_key: Function of a checkpoint. The highest value comes first.
            max_key: Name in ``meta``. The highest value comes first.
            min_key: Name in ``meta``. The lowest value comes first.
            ckpt_predicate: Only checkpoints for which it is true are considered.

        Returns:
            The checkpoint, or None if there is none.
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
        """Finds checkpoints, the most important first.

        Args:
            importance_key: See ``find_checkpoint``.
            max_key: See ``find_checkpoint``.
            min_key: See ``find_checkpoint``.
            ckpt_predicate: See ``find_checkpoint``.
            max_num_checkpoints: Maximum number of checkpoints; None for all.

        Returns:
            The checkpoints. Of two equally important ones, the newer comes first.

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
        """Recovers from the most important intact checkpoint.

        Args:
            importance_key: See ``find_checkpoint``.
            max_key: See ``find_checkpoint``.
            min_key: See ``find_checkpoint``.
            ckpt_predicate: See ``find_checkpoint``.
            device: See ``load_checkpoint``.

        Returns:
            The checkpoint, or None if there is none.

        Raises:
            CheckpointError: Each of the checkpoints is damaged or would run code.
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
        """Loads a checkpoint. Returns the error if it is skipped and another is tried."""
        try:
            self.load_checkpoint(checkpoint)
        except (DamagedCheckpointError, UnsafeCheckpointError, NotInCheckpointError) as error:
            # If SpeechBrain is killed in a save, its checkpoint lacks some files.
            full = any(self.recoverables.keys() <= each.paramfiles.keys() for each in others)
            is_partial = full and not integrity.has_checksums(checkpoint.path)
            if isinstance(error, NotInCheckpointError) and not is_partial:
                raise
            logger.warning("%s is skipped: %s", checkpoint.path, error)
            return [error]
        return []

    def load_checkpoint(self, checkpoint: Checkpoint, device: Any = None) -> None:
        """Recovers every recoverable, after the whole checkpoint was read and verified.

        Args:
            checkpoint: The checkpoint.
            device: Device for load hooks of SpeechBrain 0.5; by default the Brain's device.

        Raises:
            DamagedCheckpointError: A file was changed since it was saved.
            UnsafeCheckpointError: A file would run code.
            CheckpointError: A recoverable has no file or no load hook.
            Exception: A load hook failed. The error has a note with its object.
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
        """Returns all checkpoints with a readable meta file, unsorted."""
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
            num_to_keep: See ``save_and_keep_only``.
            min_keys: See ``save_and_keep_only``.
            max_keys: See ``save_and_keep_only``.
            importance_keys: See ``save_and_keep_only``.
            ckpt_predicate: See ``save_and_keep_only``.
            verbosity: See ``save_and_keep_only``.

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
            raise ValueError(f"num_to_keep must be 0 or greater, got {num_to_keep}")
        if not if_main_process():
            return
        listed = saved_in(self.checkpoints_dir)
        considered = [ranking.ranked(listed, ckpt_predicate) for ranking in rankings]
        # A damaged checkpoint must not be kept instead of an intact one.
        intact = [filter(self._is_intact, each) for each in considered]
        kept = {ckpt for each in intact for ckpt in itertools.islice(each, num_to_keep)}
        for checkpoint in set(itertools.chain(*considered)) - kept:
            atomic_directory.delete(checkpoint.path)
            logger.log(verbosity, "Deleted checkpoint in %s", checkpoint.path)

    def _is_intact(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is intact. Reads it once, later only checks file sizes."""
        check = integrity.check_sizes if checkpoint.path in self._intact else integrity.check
        try:
            check(checkpoint.path)
        except (CheckpointError, OSError):
            return False
        self._intact.add(checkpoint.path)
        return True
