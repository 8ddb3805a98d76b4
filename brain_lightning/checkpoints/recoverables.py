"""The objects of a checkpoint: recoverables by name, with their save and load hooks."""

from __future__ import annotations

import json
import logging
import pickle
import warnings
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch.nn import Module
from torch.optim import Optimizer

from brain_lightning.compat.load_hooks import LOAD_HOOK, device_of, loading_to, without_device
from brain_lightning.compat.versions import add_note
from brain_lightning.distributed.communication import if_main_process
from brain_lightning.errors import (
    CheckpointError,
    DamagedCheckpointError,
    NotInCheckpointError,
)
from brain_lightning.fsdp2.state_dict import (
    is_saved_together,
    save_full_optimizers,
    with_full_states,
)

from . import integrity, state_files
from .async_save import StateCopies
from .hooks import Hook, load_hook, save_hook

logger = logging.getLogger(__name__)

# Errors that readers raise only if the content of a file is damaged.
UNREADABLE = (
    yaml.YAMLError,
    json.JSONDecodeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    UnicodeDecodeError,
    EOFError,
)


class Recoverables:
    """Objects by name, with the hooks that save and load them.

    Args:
        recoverables: Objects by name.
        custom_load_hooks: Load hooks by name of the object. A hook is called with the object,
            the path and ``end_of_epoch``. A hook with a ``device`` argument, as in
            SpeechBrain 0.5, is also called with the device.
        custom_save_hooks: Save hooks by name of the object. A hook is called with the object
            and the path.
        allow_partial_load: Whether a checkpoint may lack recoverables.

    Attributes:
        ignore_mismatched_sizes: Names of recoverables, or of parts of modules such as
            ``model.output``. A parameter in them whose shape differs from the checkpoint is
            not loaded and keeps its initial value.
        writes_shards: Whether each rank writes its own shards of sharded objects
            (``FSDP2Strategy(sharded_checkpoints=True)``), to a folder with the name of the
            file of the object.
    """

    writes_shards = False
    ignore_mismatched_sizes: Collection[str] = ()

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
        """Adds a recoverable.

        Args:
            name: Name of the object and of its file.
            obj: The object.
            custom_load_hook: See ``custom_load_hooks`` of the class.
            custom_save_hook: See ``custom_save_hooks`` of the class.
            optional_load: Whether a checkpoint may lack the object.
        """
        self.recoverables[name] = obj
        self.optional_recoverables[name] = optional_load
        if custom_load_hook is not None:
            self.custom_load_hooks[name] = custom_load_hook
        if custom_save_hook is not None:
            self.custom_save_hooks[name] = custom_save_hook

    def add_recoverables(self, recoverables: Mapping[str, Any]) -> None:
        """Adds several recoverables.

        Args:
            recoverables: Objects by name.

        Raises:
            AttributeError: The argument is not a mapping (the exception of SpeechBrain).
        """
        if not isinstance(recoverables, Mapping):
            raise AttributeError(
                f"recoverables must be a mapping from names to objects, got {recoverables!r}"
            )
        self.recoverables.update(recoverables)

    def may_be_saved(self) -> bool:
        """Whether all trainable parameters are finite. If not, logs an error."""
        broken = state_files.not_finite(self.recoverables)
        if broken:
            logger.error(
                "No checkpoint is saved, because parameters of %s are not finite. The earlier "
                "checkpoints are unchanged.",
                ", ".join(broken),
            )
        return not broken

    def write(self, directory: Path, copies: StateCopies | None) -> dict[Path, Any]:
        """Calls the save hook of each recoverable.

        Args:
            directory: Directory to write to.
            copies: Copies the states for a save in the background. If it is None, all states
                are written immediately.

        Returns:
            Copies of the states that must still be written, by path.

        Raises:
            CheckpointError: A recoverable has no save hook.
            Exception: A hook failed. The other hooks were called before it was raised,
                because they may be collective.
        """
        hooks = {name: self._save_hook(name) for name in self.recoverables}
        deferred: dict[Path, Any] = {}
        failures: list[Exception] = []
        for name, hook in hooks.items():
            path = directory / f"{name}{state_files.PARAMFILE_EXT}"
            try:
                if self.writes_shards and self._may_be_in_shards(name, hook):
                    own = state_files.write_shards(self.recoverables[name], path)
                    integrity.write_checksums_together(path, own)
                else:
                    deferred |= _write(self.recoverables[name], hook, path, copies)
            except Exception as error:  # noqa: BLE001  raised below
                failures.append(error)
        if failures:
            raise failures[0]
        return deferred

    def files_to_load(self, path: Path, found: Mapping[str, Path]) -> dict[str, Path]:
        """Returns the file of each recoverable in a checkpoint.

        Args:
            path: The checkpoint.
            found: Files of the checkpoint by name.

        Returns:
            Files by name, in the order of the recoverables.

        Raises:
            NotInCheckpointError: A required recoverable has no file.
        """
        needed = {} if self.allow_partial_load else self.recoverables
        for name in needed.keys() - found.keys():
            missing = f"{path} has no file for {name!r}"
            if "dataloader" not in name and not self.optional_recoverables.get(name):
                raise NotInCheckpointError(
                    f"{missing}, because it was saved without this object. To load the other "
                    "objects, set allow_partial_load=True."
                )
            warnings.warn(f"{missing}. The object is not loaded.", UserWarning, stacklevel=4)
        return {name: found[name] for name in self.recoverables if name in found}

    def read(self, files: Mapping[str, Path]) -> dict[str, Any]:
        """Reads the states that can be read before any object is changed.

        Args:
            files: Files by name.

        Returns:
            State by name, for the recoverables that torch loads.

        Raises:
            CheckpointError: A file cannot be read, or would run code.
        """
        return {
            name: state_files.load_state(path, self.recoverables[name])
            for name, path in files.items()
            if name in self.recoverables
            and self._load_hook(name) is state_files.torch_recovery
        }

    def load(
        self,
        files: Mapping[str, Path],
        states: Mapping[str, Any],
        end_of_epoch: bool,
        checked: bool = True,
    ) -> None:
        """Calls the load hook of each recoverable.

        If a hook fails, its error gets a note with the object, the file, and the objects that
        were recovered before.

        Args:
            files: Files by name.
            states: Result of ``read`` for the files.
            end_of_epoch: Whether an epoch had ended.
            checked: Whether checksums have shown that the files are unchanged.

        Raises:
            DamagedCheckpointError: A file that was not checked cannot be read.
            CheckpointError: A recoverable has no load hook.
        """
        hooks: dict[str, Hook] = {}
        for name in files:
            hook, obj = self._load_hook(name), self.recoverables[name]
            if hook is None:
                raise _no_hook("recover", name, obj, "load_state_dict", "custom_load_hook")
            hooks[name] = without_device(hook, *LOAD_HOOK)
        save_full_optimizers(self.recoverables.values())
        recovered: list[str] = []
        parts = self._mismatched_parts(states)
        for name, path in files.items():
            try:
                if name in states:
                    self._apply(name, states[name])
                else:
                    with loading_to(None, device_of(self.recoverables.get("brain"))):
                        hooks[name](self.recoverables[name], path, end_of_epoch)
            except Exception as error:
                # Torch's archives have their own checksums.
                unsure = not checked and not zipfile.is_zipfile(path)
                self._explain(error, name, path, recovered, unsure, self._remedy(name, parts))
                raise
            recovered.append(name)
        self._reset_optimizers(parts)

    def _apply(self, name: str, state: dict[str, Any]) -> None:
        """Loads the state of an object, except ignored parameters with another shape."""
        obj = self.recoverables[name]
        for key in state_files.mismatched(obj, state):
            if self._is_ignored(f"{name}.{key}"):
                own = obj.state_dict(keep_vars=True)[key]
                logger.warning(
                    "%s.%s is not loaded: its shape is %s, but %s in the checkpoint.",
                    name,
                    key,
                    tuple(own.shape),
                    tuple(state[key].shape),
                )
                state[key] = own
        state_files.apply_state(obj, state)

    def _mismatched_parts(self, states: Mapping[str, Any]) -> dict[str, list[str]]:
        """Returns the keys whose shapes differ from the checkpoint, by recoverable."""
        found = {n: state_files.mismatched(self.recoverables[n], s) for n, s in states.items()}
        return {name: keys for name, keys in found.items() if keys}

    def _is_ignored(self, part: str) -> bool:
        named = self.ignore_mismatched_sizes
        named = (named,) if isinstance(named, str) else named
        return any(part == each or part.startswith(f"{each}.") for each in named)

    def _reset_optimizers(self, left_out: Mapping[str, Collection[str]]) -> None:
        """Removes the optimizer state of parameters that were not loaded."""
        parameters = [
            parameter
            for name, keys in left_out.items()
            for key, parameter in self.recoverables[name].named_parameters()
            if key in keys
        ]
        for obj in self.recoverables.values() if parameters else ():
            if isinstance(obj, Optimizer):
                for parameter in parameters:
                    obj.state.pop(parameter, None)

    def _explain(
        self,
        error: Exception,
        name: str,
        path: Path,
        recovered: Iterable[str],
        unsure: bool,
        remedy: str,
    ) -> None:
        """Adds the object, its file and the recovered objects to an error."""
        changed = ", ".join(map(repr, recovered)) or "nothing"
        if unsure and isinstance(error, UNREADABLE):
            raise DamagedCheckpointError(
                f"{path} cannot be read: {error}. Recovered before it: {changed}."
            ) from error
        note = (
            f"{name!r} could not be recovered from {path}. Recovered before it: {changed}. "
            f"{remedy}"
        )
        if unsure:
            note += " The file has no checksum, so it may also have been truncated by a kill."
        add_note(error, note.strip())

    def _remedy(self, name: str, mismatched: Mapping[str, Collection[str]]) -> str:
        """Returns advice for an object that cannot be recovered; empty by default."""
        return ""

    def remedy_by_name(self, name: str, mismatched: Mapping[str, Collection[str]]) -> str:
        """Returns advice that names the objects, for users of a Checkpointer.

        Args:
            name: Recoverable that could not be recovered.
            mismatched: Keys whose shapes differ from the checkpoint, by recoverable.
        """
        if name in mismatched:
            keys = [f"{each}.{key}" for each, own in mismatched.items() for key in own]
            parts = sorted({key.rpartition(".")[0] for key in keys})
            return (
                "To load everything except parameters with another shape, set "
                f"checkpointer.ignore_mismatched_sizes = {parts}."
            )
        hooks = "; ".join(
            f"checkpointer.custom_load_hooks[{each!r}] = lambda *_: None"
            for each in (name, *self.optimizers_of(name))
        )
        return f"To load the other objects and not this one, set {hooks}."

    def optimizers_of(self, name: str) -> list[str]:
        """Returns the recoverable optimizers that hold a parameter of a module.

        Args:
            name: Name of any recoverable. If it is not a module, the result is empty.
        """
        module = self.recoverables[name]
        own = set(map(id, module.parameters())) if isinstance(module, Module) else set()
        return [
            each
            for each, obj in self.recoverables.items()
            if isinstance(obj, Optimizer)
            and any(id(p) in own for group in obj.param_groups for p in group["params"])
        ]

    def _may_be_in_shards(self, name: str, hook: Hook) -> bool:
        """Whether an object is sharded and has no custom save or load hook."""
        by_torch = hook is state_files.torch_save
        by_torch = by_torch and self._load_hook(name) is state_files.torch_recovery
        return by_torch and is_saved_together(self.recoverables[name])

    def _save_hook(self, name: str) -> Hook:
        obj = self.recoverables[name]
        hook = self.custom_save_hooks.get(name) or save_hook(obj)
        if hook is None:
            raise _no_hook("save", name, obj, "state_dict", "custom_save_hook")
        return hook

    def _load_hook(self, name: str) -> Hook | None:
        return self.custom_load_hooks.get(name) or load_hook(self.recoverables[name])


def _write(obj: Any, hook: Hook, path: Path, copies: StateCopies | None) -> dict[Path, Any]:
    """Saves one object. Returns a copy of its state if it must still be written."""
    if hook is not state_files.torch_save:
        with with_full_states(obj):
            hook(obj, path)
        return {}
    if not if_main_process() and not is_saved_together(obj):
        return {}
    state = state_files.state_to_save(obj)
    if not if_main_process():
        return {}
    if copies is not None:
        return {path: copies.take(state)}
    state_files.write_state(state, path)
    return {}


def _no_hook(verb: str, name: str, obj: Any, method: str, argument: str) -> CheckpointError:
    return CheckpointError(
        f"{name!r}, a {type(obj).__name__}, has no hook to {verb} it. Define {method}, "
        "register its class with register_checkpoint_hooks, or pass "
        f"{argument} to add_recoverable."
    )
