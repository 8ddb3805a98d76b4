"""Chooses the checkpoint of a run in cases in which Lightning would choose another one."""

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
    """Replaces how Lightning reads the ``ckpt_path`` of the next run.

    If there is no last checkpoint, ``"last"`` selects the newest one. (Lightning would start
    from scratch, with a warning: ``_parse_ckpt_path``.) In a requeued SLURM job, Lightning
    would load the job's checkpoint in every run, including evaluations of the weights in
    memory and nested fits. Lightning calls no hook between ``fit`` and this choice.

    Args:
        trainer: The Trainer that has just been given a module.
        take: Function that returns whether the module loads a ``ckpt_path`` itself. Lightning
            then loads nothing.
        is_within: Whether the next run is nested in another run of the same Brain.
    """
    connector: Any = trainer._checkpoint_connector
    vars(connector).pop("_parse_ckpt_path", None)
    parse = connector._parse_ckpt_path

    def _parse_ckpt_path(state_fn: Any, ckpt_path: Any, **kwargs: Any) -> Any:
        vars(connector).pop("_parse_ckpt_path", None)
        resumes = state_fn is TrainerFn.FITTING and not is_within
        uses_memory = ckpt_path is None and kwargs["model_provided"] and not resumes
        if uses_memory or take(ckpt_path):
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
        f'fit(ckpt_path="last"): there is no last checkpoint, so the newest one is loaded, '
        f"{newest}. Use ModelCheckpoint(save_last=True) to save a last checkpoint."
    )
    return str(newest)
