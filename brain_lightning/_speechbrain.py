"""What real SpeechBrain objects need, where SpeechBrain is in use.

Never imports SpeechBrain: an object of its classes can only be there if its
modules are loaded already.
"""

from __future__ import annotations

import sys
from typing import Any


def _loaded(module: str, name: str) -> Any:
    """The named attribute of a SpeechBrain module, or None where nobody loaded it."""
    return getattr(sys.modules.get(f"speechbrain.{module}"), name, None)


def _is_a(obj: object, module: str, name: str) -> bool:
    cls = _loaded(module, name)
    return cls is not None and isinstance(obj, cls)


def is_looped_loader(obj: object) -> bool:
    """Whether ``obj`` is SpeechBrain's LoopedLoader."""
    return _is_a(obj, "dataio.dataloader", "LoopedLoader")


def is_saveable_loader(obj: object) -> bool:
    """Whether SpeechBrain's Checkpointer can save ``obj``'s position in the data."""
    return is_looped_loader(obj) or _is_a(obj, "dataio.dataloader", "SaveableDataLoader")


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
