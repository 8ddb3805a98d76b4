"""Which file a run begins with, where Lightning chooses another than is meant."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from .trainer_callbacks import callbacks_of


def read_ckpt_path(trainer: Trainer, take: Callable[[Any], bool], is_within: bool) -> None:
    """Reads the ``ckpt_path`` of the next run in the place of Lightning.

    ``"last"`` means the newest where there is no last: Lightning would start from scratch,
    with a warning (``_parse_ckpt_path``). In a job of SLURM's that was requeued it would
    resume everything from what the job has saved: an evaluation of the weights in memory as
    well, and a fit within the fit that is resumed. It has no hook between the call of
    ``fit`` and its decision.

    Args:
        trainer: The Trainer that has just been given a module.
        take: Whether the module takes care of a ``ckpt_path``; Lightning loads nothing then.
        is_within: Whether the next run is within another one of the same Brain.
    """
    connector: Any = trainer._checkpoint_connector
    vars(connector).pop("_parse_ckpt_path", None)
    parse = connector._parse_ckpt_path

    def _parse_ckpt_path(state_fn: Any, ckpt_path: Any, **kwargs: Any) -> Any:
        vars(connector).pop("_parse_ckpt_path", None)
        resumes = state_fn is TrainerFn.FITTING and not is_within
        of_memory = ckpt_path is None and kwargs["model_provided"] and not resumes
        if of_memory or take(ckpt_path):
            return None
        if ckpt_path == "last" and not _has_last(trainer):
            ckpt_path = _newest(trainer) or ckpt_path
        return parse(state_fn, ckpt_path, **kwargs)

    connector._parse_ckpt_path = _parse_ckpt_path


def _has_last(trainer: Trainer) -> bool:
    on_exception = [getattr(callback, "ckpt_path", None) for callback in callbacks_of(trainer)]
    return any(path is not None and os.path.exists(path) for path in on_exception) or any(
        callback._find_last_checkpoints(trainer)
        for callback in trainer.checkpoint_callbacks
        if hasattr(callback, "_find_last_checkpoints")
    )


def _newest(trainer: Trainer) -> str | None:
    default = Path(trainer.default_root_dir, "checkpoints")
    folders = [
        Path(getattr(callback, "dirpath", None) or default)
        for callback in trainer.checkpoint_callbacks
    ]
    found = [path for folder in folders for path in folder.glob("*.ckpt")]
    if not found:
        return None
    newest = max(found, key=lambda path: path.stat().st_mtime)
    rank_zero_warn(
        f'fit(ckpt_path="last"): there is no last checkpoint, and {newest} is the newest; it '
        "is taken. ModelCheckpoint(save_last=True) keeps a last one."
    )
    return str(newest)
