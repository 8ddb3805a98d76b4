"""What real SpeechBrain objects need, where SpeechBrain is in use.

Never imports SpeechBrain: an object of its classes can only be there if its
modules are loaded already.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from brain_lightning.errors import UnsupportedError
from brain_lightning.protocol import hparams_of
from brain_lightning.temporary import TemporaryAttributes

from .versions import run_option_defaults


def _loaded(module: str, name: str) -> Any:
    """The named attribute of a SpeechBrain module, or None where nobody loaded it."""
    return getattr(sys.modules.get(f"speechbrain.{module}"), name, None)


def _is_a(obj: object, module: str, name: str) -> bool:
    cls = _loaded(module, name)
    return cls is not None and isinstance(obj, cls)


def is_main_process_alone() -> bool:
    """Whether the others wait for something that the main process does alone."""
    return bool(_loaded("utils.distributed", "MAIN_PROC_ONLY"))


def is_speechbrains(brain: object) -> bool:
    """Whether ``brain`` is a Brain of SpeechBrain's."""
    return _is_a(brain, "core", "Brain")


def adopt(brain: Any) -> None:
    """Gives a SpeechBrain Brain what the Trainer's side asks for beyond it, once.

    Args:
        brain: Any Brain; nothing happens to ours.

    Raises:
        UnsupportedError: It was told to use DataParallel.
    """
    if not is_speechbrains(brain) or hasattr(brain, "stage_type"):
        return
    if brain.data_parallel_backend:
        raise UnsupportedError(
            "run option data_parallel_backend=True is not supported: start one process for "
            "each device, with torchrun or --trainer.devices=2"
        )
    brain.stage_type = _loaded("core", "Stage")
    # SpeechBrain's own has one from 1.1 on.
    brain.device_type = torch.device(brain.device).type
    brain.gradient_clip_algorithm = "norm"
    brain.ends_window = False
    brain.shard_eval = False
    hparams = hparams_of(brain)
    brain.progress = hparams.get("progress", "auto")
    brain.progress_interval = hparams.get("progress_interval", 10)
    brain.explicit_options = _given_options(brain)
    brain.trainer_arguments = hparams.get("trainer") or {}
    # There already where the command line gave some: see patch.py.
    brain.trainer_overrides = getattr(brain, "trainer_overrides", {})
    brain.trainer_callbacks = getattr(brain, "trainer_callbacks", ())


def _given_options(brain: Any) -> frozenset[str]:
    """The run options that differ from their defaults: SpeechBrain remembers no more."""
    defaults = run_option_defaults(sys.modules["speechbrain.core"])
    return frozenset(
        name for name, default in defaults.items() if getattr(brain, name, default) != default
    )


def lend_validation(brain: object, temporary: TemporaryAttributes) -> None:
    """Lets SpeechBrain's ``_fit_valid``, where a recipe's own calls it, be the Trainer's.

    Args:
        brain: A Brain with a ``_validate`` of its own for the run; nothing happens to
            the class of ours.
        temporary: Records what is changed.
    """
    brain_class: Any = _loaded("core", "Brain")
    if brain_class is None or not isinstance(brain, brain_class):
        return
    own = brain_class._fit_valid

    def _fit_valid(self: Any, *args: Any, **kwargs: Any) -> None:
        # Another Brain may be in SpeechBrain's own loop meanwhile.
        validate = vars(self).get("_validate")
        own(self, *args, **kwargs) if validate is None else validate()

    temporary.override(brain_class, "_fit_valid", _fit_valid)


def is_looped_loader(obj: object) -> bool:
    """Whether ``obj`` is SpeechBrain's LoopedLoader."""
    return _is_a(obj, "dataio.dataloader", "LoopedLoader")


def is_saveable_loader(obj: object) -> bool:
    """Whether SpeechBrain's Checkpointer can save ``obj``'s position in the data."""
    return is_looped_loader(obj) or _is_a(obj, "dataio.dataloader", "SaveableDataLoader")


def told_position(loader: Any) -> int:
    """The batches that a SaveableDataLoader was told to leave out, by its Checkpointer.

    Args:
        loader: Any loader.
    """
    return getattr(loader, "_speechbrain_recovery_skip_to", None) or 0


def forget_position(loader: Any) -> None:
    """Keeps a SaveableDataLoader from leaving batches out by itself.

    Args:
        loader: Any loader; nothing happens to others.
    """
    if is_saveable_loader(loader) and not is_looped_loader(loader):
        loader._speechbrain_recovery_skip_to = None


def follow_iterator(loader: Any, iterator: Any, position: int) -> None:
    """Lets a SaveableDataLoader save the position of an iterator that it did not make.

    Args:
        loader: Any loader; nothing happens to others.
        iterator: Of a copy of it.
        position: Batches before the iterator's first.
    """
    if is_saveable_loader(loader) and not is_looped_loader(loader):
        forget_position(loader)
        loader._speechbrain_iterator = iterator
        iterator._num_yielded = position


def is_checkpointer(obj: object) -> bool:
    """Whether ``obj`` is SpeechBrain's Checkpointer."""
    return _is_a(obj, "utils.checkpoints", "Checkpointer")


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
        kind: SAVE, LOAD or TRANSFER.
    """
    return _loaded("utils.checkpoints", f"DEFAULT_{kind}_HOOKS") or {}


def register_checkpoint_hooks(*classes: Any) -> None:
    """Teaches SpeechBrain's Checkpointer to save and recover our classes.

    Does what ``speechbrain.utils.checkpoints.register_checkpoint_hooks`` does,
    for classes that could not be decorated with it.

    Args:
        *classes: Each with ``_save(path)`` and ``_recover(path, end_of_epoch)``.
    """
    saving = _loaded("utils.checkpoints", "DEFAULT_SAVE_HOOKS")
    loading = _loaded("utils.checkpoints", "DEFAULT_LOAD_HOOKS")
    if saving is None or loading is None:
        return
    for cls in classes:
        saving.setdefault(cls, cls._save)
        loading.setdefault(cls, cls._recover)
