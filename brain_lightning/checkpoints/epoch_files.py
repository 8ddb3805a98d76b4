"""The files of epoch counters, which SpeechBrain and brain_lightning can both read.

SpeechBrain's Checkpointer saves only a number for an ``EpochCounterWithStopper``, like for an
``EpochCounter``. brain_lightning writes the same file. It saves the best epoch, from which
patience is counted, in a second file that SpeechBrain ignores. It also reads the YAML file
that ``EpochCounterWithStopper._save`` of SpeechBrain writes.
"""

from __future__ import annotations

import logging
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from .state_files import load_state

logger = logging.getLogger(__name__)

# Not .ckpt, because every .ckpt file is the file of a recoverable.
STOPPER_EXT = ".stopper.yaml"


def save_counter(counter: Any, path: str | PathLike[str]) -> None:
    """Saves the epoch number.

    Args:
        counter: An ``EpochCounter``.
        path: Path of the file.
    """
    Path(path).write_text(str(counter.current), encoding="utf-8")


def save_stopper(counter: Any, path: str | PathLike[str]) -> None:
    """Saves the epoch number, and the best epoch in a second file.

    Args:
        counter: An ``EpochCounterWithStopper``.
        path: Path of the file with the epoch number.
    """
    save_counter(counter, path)
    state = {
        "current_epoch": counter.current,
        "best_epoch": counter.best_limit,
        # The metric may be a number of any library, such as numpy or torch.
        "best_score": float(counter.best_score),
        "should_stop": bool(counter.should_stop),
    }
    _beside(path).write_text(yaml.safe_dump(state), encoding="utf-8")


def load_counter(counter: Any, path: str | PathLike[str], end_of_epoch: bool = True) -> None:
    """Recovers the epoch number from the file of either counter class.

    Args:
        counter: An ``EpochCounter``.
        path: Path of the file.
        end_of_epoch: Whether the epoch had ended. If it had not, it is counted again.
    """
    counter.current = _state(path)["current_epoch"] - (not end_of_epoch)


def load_stopper(counter: Any, path: str | PathLike[str], end_of_epoch: bool = True) -> None:
    """Recovers the epoch number, and the best epoch if it was saved.

    Args:
        counter: An ``EpochCounterWithStopper``.
        path: Path of the file with the epoch number.
        end_of_epoch: See ``load_counter``.
    """
    state = _state(path)
    counter.current = state["current_epoch"] - (not end_of_epoch)
    if "best_epoch" not in state:
        logger.warning(
            "%s has an epoch number but no best epoch. The patience of %s restarts after "
            "epoch %d.",
            path,
            type(counter).__name__,
            counter.current,
        )
    counter.best_limit = state.get("best_epoch", counter.current)
    counter.best_score = state.get("best_score", counter.sign * float("inf"))
    counter.should_stop = state.get("should_stop", False)


def load_steps(scheduler: Any, path: str | PathLike[str], end_of_epoch: bool) -> None:  # noqa: ARG001
    """Recovers a scheduler that SpeechBrain saves and does not recover.

    Args:
        scheduler: SpeechBrain's ``InverseSquareRootScheduler``.
        path: Path of the file.
        end_of_epoch: Not used.
    """
    scheduler.n_steps = load_state(Path(path))["n_steps"]


def _beside(path: str | PathLike[str]) -> Path:
    return Path(path).with_suffix(STOPPER_EXT)


def _state(path: str | PathLike[str]) -> dict[str, Any]:
    """Returns the epoch number, and the best epoch if it was saved."""
    state = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if isinstance(state, int):
        return _state_beside(path, state)
    if not isinstance(state, dict):
        raise ValueError(
            f"{path} is not the file of an epoch counter: it contains {str(state)[:40]!r}"
        )
    return state


def _state_beside(path: str | PathLike[str], epoch: int) -> dict[str, Any]:
    """Returns the content of the second file if it was saved with this epoch number."""
    beside = _beside(path)
    state = yaml.safe_load(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    return state if state.get("current_epoch") == epoch else {"current_epoch": epoch}
