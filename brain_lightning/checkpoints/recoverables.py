"""What a checkpoint holds: objects by name, each with its way to be saved and recovered."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brain_lightning.distributed.communication import if_main_process
from brain_lightning.errors import CheckpointError, NotInCheckpointError

from . import state_files
from .async_save import Snapshots
from .hooks import Hook, load_hook, save_hook

logger = logging.getLogger(__name__)


class Recoverables:
    """Objects by name, and their hooks.

    Args:
        recoverables: Objects by name.
        custom_load_hooks: By name, each called with the object, the path, and whether
            it was the end of an epoch.
        custom_save_hooks: By name, each called with the object and the path.
        allow_partial_load: Whether a checkpoint may lack a recoverable.
    """

    def __init__(
        self,
        recoverables: Mapping[str, Any] | None = None,
        custom_load_hooks: Mapping[str, Hook] | None = None,
        custom_save_hooks: Mapping[str, Hook] | None = None,
        allow_partial_load: bool = False,
    ) -> None:
        self.recoverables: dict[str, Any] = {}
        self.optional_recoverables: dict[str, bool] = {}
        self.custom_load_hooks = dict(custom_load_hooks or {})
        self.custom_save_hooks = dict(custom_save_hooks or {})
        self.allow_partial_load = allow_partial_load
        if recoverables is not None:
            self.add_recoverables(recoverables)

    def add_recoverable(
        self,
        name: str,
        obj: Any,
        custom_load_hook: Hook | None = None,
        custom_save_hook: Hook | None = None,
        optional_load: bool = False,
    ) -> None:
        """Adds an object to what is saved and recovered.

        Args:
            name: Its name, and that of its file.
            obj: The object.
            custom_load_hook: See the class.
            custom_save_hook: See the class.
            optional_load: Whether a checkpoint may lack it.
        """
        self.recoverables[name] = obj
        self.optional_recoverables[name] = optional_load
        if custom_load_hook is not None:
            self.custom_load_hooks[name] = custom_load_hook
        if custom_save_hook is not None:
            self.custom_save_hooks[name] = custom_save_hook

    def add_recoverables(self, recoverables: Mapping[str, Any]) -> None:
        """Adds several.

        Args:
            recoverables: Objects by name.

        Raises:
            AttributeError: It is no mapping (as SpeechBrain's).
        """
        if not isinstance(recoverables, Mapping):
            raise AttributeError(
                f"recoverables must be a mapping of names to objects, got {recoverables!r}"
            )
        self.recoverables.update(recoverables)

    def may_be_saved(self) -> bool:
        """Whether every parameter that is trained is finite; where not, it is logged."""
        broken = [n for n, obj in self.recoverables.items() if not state_files.is_finite(obj)]
        if broken:
            logger.error(
                "No checkpoint is saved: %s has a parameter that is not finite. The earlier "
                "checkpoints are as they were.",
                ", ".join(broken),
            )
        return not broken

    def write(self, directory: Path, snapshots: Snapshots | None) -> dict[Path, Any]:
        """Calls the save hook of each recoverable.

        Args:
            directory: Where to write to.
            snapshots: Copies states to be written in the background; None has all of
                them written now.

        Returns:
            Copies of the states that are still to be written, by their files.

        Raises:
            CheckpointError: A recoverable has no way to be saved.
        """
        deferred: dict[Path, Any] = {}
        for name, obj in self.recoverables.items():
            path = directory / f"{name}{state_files.PARAMFILE_EXT}"
            hook = self.custom_save_hooks.get(name) or save_hook(obj)
            if hook is None:
                raise _no_hook("save", name, obj, "state_dict", "custom_save_hook")
            if hook is state_files.torch_save and not if_main_process():
                continue
            if hook is state_files.torch_save and snapshots is not None:
                deferred[path] = snapshots.take(obj)
            else:
                hook(obj, path)
        return deferred

    def files_to_load(self, path: Path, found: Mapping[str, Path]) -> dict[str, Path]:
        """The file of each recoverable that is in a checkpoint.

        Args:
            path: The checkpoint.
            found: Its files by name.

        Returns:
            Files by name, in the order of the recoverables.

        Raises:
            NotInCheckpointError: One that is needed is not there.
        """
        needed = {} if self.allow_partial_load else self.recoverables
        for name in needed.keys() - found.keys():
            missing = f"{path} has no file for {name!r}"
            if "dataloader" not in name and not self.optional_recoverables.get(name):
                raise NotInCheckpointError(
                    f"{missing}: it was saved without; allow_partial_load=True loads the rest"
                )
            warnings.warn(f"{missing}: it is left as it is", UserWarning, stacklevel=4)
        return {name: found[name] for name in self.recoverables if name in found}

    def read(self, files: Mapping[str, Path]) -> dict[str, Any]:
        """Reads what has to be read before anything is changed.

        Args:
            files: Files by name.

        Returns:
            The states of those recoverables that have one.

        Raises:
            CheckpointError: A file cannot be read, or would run code.
        """
        return {
            name: state_files.load_state(path)
            for name, path in files.items()
            if name in self.recoverables
            and self._load_hook(name) is state_files.torch_recovery
        }

    def load(
        self, files: Mapping[str, Path], states: Mapping[str, Any], end_of_epoch: bool
    ) -> None:
        """Calls the load hook of each recoverable.

        Args:
            files: Files by name.
            states: What ``read`` returned for them.
            end_of_epoch: Whether an epoch had ended.

        Raises:
            CheckpointError: A recoverable has no way to be recovered.
        """
        hooks: dict[str, Hook] = {}
        for name in files:
            hook, obj = self._load_hook(name), self.recoverables[name]
            if hook is None:
                raise _no_hook("recover", name, obj, "load_state_dict", "custom_load_hook")
            hooks[name] = hook
        for name, path in files.items():
            if name in states:
                state_files.apply_state(self.recoverables[name], states[name])
            else:
                hooks[name](self.recoverables[name], path, end_of_epoch)

    def _load_hook(self, name: str) -> Hook | None:
        return self.custom_load_hooks.get(name) or load_hook(self.recoverables[name])


def _no_hook(verb: str, name: str, obj: Any, method: str, argument: str) -> CheckpointError:
    return CheckpointError(
        f"no way to {verb} {name!r}, a {type(obj).__name__}: give it a {method}, register its "
        f"class with register_checkpoint_hooks, or give add_recoverable a {argument}"
    )
