"""What real SpeechBrain objects need, where SpeechBrain is in use.

Never imports SpeechBrain: an object of its classes can only be there if its
modules are loaded already.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from brain_lightning.errors import UnsupportedError
from brain_lightning.protocol import PARTS, hparam
from brain_lightning.temporary import TemporaryAttributes

from .versions import run_option_defaults


def _loaded(module: str, name: str) -> Any:
    """The named attribute of a SpeechBrain module, or None where nobody loaded it."""
    return getattr(sys.modules.get(f"speechbrain.{module}"), name, None)


def _is_a(obj: object, module: str, name: str) -> bool:
    return isinstance(obj, _loaded(module, name) or ())


def is_main_process_alone() -> bool:
    """Whether the other processes wait for a function that only the main process calls."""
    return bool(_loaded("utils.distributed", "MAIN_PROC_ONLY"))


def is_speechbrains(brain: object) -> bool:
    """Whether ``brain`` is a Brain of SpeechBrain's."""
    return _is_a(brain, "core", "Brain")


def add_attributes(brain: Any) -> None:
    """Gives a SpeechBrain Brain, once, the attributes that only ours has.

    Args:
        brain: Any Brain; nothing happens to ours.

    Raises:
        UnsupportedError: It is to use DataParallel.
    """
    if not is_speechbrains(brain) or hasattr(brain, "stage_type"):
        return
    if brain.data_parallel_backend:
        raise UnsupportedError(
            "run option data_parallel_backend=True is not supported: start one process for "
            "each device, with torchrun or --trainer.devices=2"
        )
    brain.stage_type = _loaded("core", "Stage")
    # SpeechBrain's Brain has one from 1.1 on.
    brain.device_type = torch.device(brain.device).type
    brain.gradient_clip_algorithm = "norm"
    brain.ends_window = False
    brain.shard_eval = False
    brain.progress = hparam(brain, "progress", "auto")
    brain.progress_interval = hparam(brain, "progress_interval", 10)
    # SpeechBrain keeps no more of them than the values.
    defaults = run_option_defaults(sys.modules["speechbrain.core"])
    brain.explicit_options = frozenset(
        name for name, default in defaults.items() if getattr(brain, name, default) != default
    )
    brain.trainer_arguments = hparam(brain, "trainer") or {}
    # Those of the command line are there already: see patch.py.
    brain.trainer_overrides = getattr(brain, "trainer_overrides", {})
    brain.trainer_callbacks = getattr(brain, "trainer_callbacks", ())


def redirect_parts(
    brain: object, parts_of: Callable[[Any], Any], temporary: TemporaryAttributes
) -> None:
    """Makes SpeechBrain's ``_fit_train`` and ``_fit_valid`` stages of a Trainer run.

    Args:
        brain: The Brain that runs; nothing happens to the class of ours.
        parts_of: Returns the stages of a Brain's run, or None where it has none.
        temporary: Records what is changed.
    """
    if not is_speechbrains(brain):
        return
    brain_class: Any = _loaded("core", "Brain")
    for name, stage in PARTS.items():
        redirected = functools.partialmethod(
            _run_part, getattr(brain_class, name), parts_of, stage
        )
        temporary.override(brain_class, name, redirected)


def _run_part(
    brain: Any,
    original: Any,
    parts_of: Callable[[Any], Any],
    stage: str,
    *args: Any,
    **kwargs: Any,
) -> None:
    parts = parts_of(brain)
    if parts is None or not getattr(parts, f"may_{stage}"):
        # Another Brain may be in SpeechBrain's loop at the same time.
        original(brain, *args, **kwargs)
    else:
        getattr(parts, stage)(*args, **kwargs)


def is_looped_loader(obj: object) -> bool:
    """Whether ``obj`` is SpeechBrain's LoopedLoader."""
    return _is_a(obj, "dataio.dataloader", "LoopedLoader")


def is_saveable_loader(obj: object) -> bool:
    """Whether SpeechBrain's Checkpointer can save ``obj``'s position in the data."""
    return is_looped_loader(obj) or _is_a(obj, "dataio.dataloader", "SaveableDataLoader")


def recovered_position(loader: Any) -> int:
    """The number of batches that a recovered SaveableDataLoader is to skip.

    Args:
        loader: Any loader.
    """
    return getattr(loader, "_speechbrain_recovery_skip_to", None) or 0


def clear_position(loader: Any) -> None:
    """Keeps a SaveableDataLoader from skipping batches when it is iterated.

    Args:
        loader: Any loader; nothing happens to others.
    """
    if is_saveable_loader(loader) and not is_looped_loader(loader):
        loader._speechbrain_recovery_skip_to = None


def track_iterator(loader: Any, iterator: Any, position: int) -> None:
    """Lets a SaveableDataLoader save the position of an iterator that it did not make.

    Args:
        loader: Any loader; nothing happens to others.
        iterator: Of a copy of it.
        position: Batches before the iterator's first.
    """
    if is_saveable_loader(loader) and not is_looped_loader(loader):
        clear_position(loader)
        loader._speechbrain_iterator = iterator
        iterator._num_yielded = position


def is_checkpointer(obj: object) -> bool:
    """Whether ``obj`` is SpeechBrain's Checkpointer."""
    return _is_a(obj, "utils.checkpoints", "Checkpointer")


def redirect_recovery(
    checkpointer: object, recover: Callable[..., Any], temporary: TemporaryAttributes
) -> None:
    """Makes ``recover_if_possible`` of one of SpeechBrain's Checkpointers another function.

    Args:
        checkpointer: The Checkpointer, whose class may call the method that it overrides.
        recover: Gets SpeechBrain's own method, bound, and the arguments.
        temporary: Records what is changed.
    """
    checkpointer_class: Any = _loaded("utils.checkpoints", "Checkpointer")
    original = checkpointer_class.recover_if_possible

    def recover_if_possible(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = functools.partial(original, self)
        if self is not checkpointer:
            return own(*args, **kwargs)
        return recover(own, *args, **kwargs)

    temporary.override(checkpointer_class, "recover_if_possible", recover_if_possible)


def dataloader_maker(dataset: object, checkpointer: object, looped: bool) -> Any:
    """SpeechBrain's ``make_dataloader`` where its own objects ask for it.

    Args:
        dataset: A ``DynamicItemDataset`` needs its padding.
        checkpointer: A SpeechBrain Checkpointer needs a loader that it can save.
        looped: Whether a LoopedLoader is asked for.

    Returns:
        The function, or None where a plain DataLoader serves.
    """
    padded = _is_a(dataset, "dataio.dataset", "DynamicItemDataset")
    if padded or looped or is_checkpointer(checkpointer):
        return _loaded("dataio.dataloader", "make_dataloader")
    return None


def default_hooks(kind: str) -> dict[type, Any]:
    """The hooks that classes have registered with SpeechBrain's Checkpointer.

    Args:
        kind: SAVE or LOAD.

    Returns:
        SpeechBrain's own table, or an empty one where nobody loaded it.
    """
    return _loaded("utils.checkpoints", f"DEFAULT_{kind}_HOOKS") or {}


# Classes whose own hooks save too little, or recover too little: see checkpoints/hooks.py.
_REPAIRED = {
    ("speechbrain.utils.epoch_loop", "EpochCounter"): "counter",
    ("speechbrain.utils.epoch_loop", "EpochCounterWithStopper"): "stopper",
    ("speechbrain.nnet.schedulers", "InverseSquareRootScheduler"): "steps",
}


def repaired_kind(cls: type) -> str | None:
    """The kind of file that objects of a class have here, in place of SpeechBrain's own.

    Args:
        cls: Any class.

    Returns:
        None for those that are saved and recovered as their class says.
    """
    return _REPAIRED.get((cls.__module__, cls.__name__))


def register_checkpoint_hooks(*classes: Any) -> None:
    """Registers our classes with SpeechBrain's Checkpointer.

    As ``speechbrain.utils.checkpoints.register_checkpoint_hooks``, for classes that
    could not be decorated with it.

    Args:
        *classes: Each with ``_save(path)`` and ``_recover(path, end_of_epoch)``.
    """
    for cls in classes:
        default_hooks("SAVE").setdefault(cls, cls._save)
        default_hooks("LOAD").setdefault(cls, cls._recover)
