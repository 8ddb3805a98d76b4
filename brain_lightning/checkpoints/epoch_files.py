"""The files of epoch counters, SpeechBrain's and ours: each side reads what the other wrote.

SpeechBrain's Checkpointer saves of an ``EpochCounterWithStopper`` no more than it does of an
``EpochCounter``: a bare number. So do we, and the best epoch, which patience is counted from,
goes to a file beside it, which SpeechBrain's does not look at. The YAML that the stopper's own
``_save`` writes is read, too.
"""

from __future__ import annotations

import logging
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from .state_files import load_state

logger = logging.getLogger(__name__)

# Not a .ckpt, which would be a recoverable.
STOPPER_EXT = ".stopper.yaml"


def save_counter(counter: Any, path: str | PathLike[str]) -> None:
    """Saves the number of the epoch.

    Args:
        counter: An ``EpochCounter``.
        path: The file.
    """
    Path(path).write_text(str(counter.current), encoding="utf-8")


def save_stopper(counter: Any, path: str | PathLike[str]) -> None:
    """Saves the number of the epoch, and beside it the best one.

    Args:
        counter: An ``EpochCounterWithStopper``.
        path: The file of the number.
    """
    save_counter(counter, path)
    state = {
        "current_epoch": counter.current,
        "best_epoch": counter.best_limit,
        # A metric may be a number of any library.
        "best_score": float(counter.best_score),
        "should_stop": bool(counter.should_stop),
    }
    _beside(path).write_text(yaml.safe_dump(state), encoding="utf-8")


def load_counter(counter: Any, path: str | PathLike[str], end_of_epoch: bool = True) -> None:
    """Recovers the number of the epoch, of whichever counter it was saved.

    Args:
        counter: An ``EpochCounter``.
        path: The file.
        end_of_epoch: Whether the epoch had ended; one that was cut short is counted again.
    """
    counter.current = _state(path)["current_epoch"] - (not end_of_epoch)


def load_stopper(counter: Any, path: str | PathLike[str], end_of_epoch: bool = True) -> None:
    """Recovers the number of the epoch, and the best one where it was saved.

    Args:
        counter: An ``EpochCounterWithStopper``.
        path: The file of the number.
        end_of_epoch: As for ``load_counter``.
    """
    state = _state(path)
    counter.current = state["current_epoch"] - (not end_of_epoch)
    if "best_epoch" not in state:
        logger.warning(
            "%s holds the number of an epoch and nothing of the best one: the patience of the "
            "%s begins anew after epoch %d.",
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
        path: The file.
        end_of_epoch: Of no importance here.
    """
    scheduler.n_steps = load_state(Path(path))["n_steps"]


def _beside(path: str | PathLike[str]) -> Path:
    return Path(path).with_suffix(STOPPER_EXT)


def _state(path: str | PathLike[str]) -> dict[str, Any]:
    """The number of the epoch, with what there is of the best one."""
    state = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if isinstance(state, int):
        return _state_beside(path, state)
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not of an epoch counter: it holds {str(state)[:40]!r}")
    return state


def _state_beside(path: str | PathLike[str], epoch: int) -> dict[str, Any]:
    """What lies beside the number, if it was saved with it."""
    beside = _beside(path)
    state = yaml.safe_load(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    return state if state.get("current_epoch") == epoch else {"current_epoch": epoch}
