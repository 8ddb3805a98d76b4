"""Objects that are saved, whose values tell which save was loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from brain_lightning import (
    Checkpointer,
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)


@register_checkpoint_hooks
class Counter:
    """An object with a file of its own kind."""

    def __init__(self) -> None:
        self.value = 0

    @mark_as_saver
    def save(self, path: Path) -> None:
        Path(path).write_text(str(self.value))

    @mark_as_loader
    def load(self, path: Path, end_of_epoch: bool) -> None:
        self.value = int(Path(path).read_text())


class State:
    """Three recoverables that say the same number, so that a mixture is seen."""

    def __init__(self, folder: Path, size: int = 30_000) -> None:
        self.model = torch.nn.Linear(size, 1, bias=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.counter = Counter()
        self.checkpointer = Checkpointer(
            folder, {"model": self.model, "optimizer": self.optimizer, "counter": self.counter}
        )

    def set(self, value: int) -> None:
        self.model.weight.data.fill_(value)
        self.optimizer.param_groups[0]["lr"] = float(value)
        self.counter.value = value

    def values(self) -> set[float]:
        weights = set(self.model.weight.detach().unique().tolist())
        return {*weights, self.optimizer.param_groups[0]["lr"], float(self.counter.value)}


def saved(folder: Path, *values: int) -> State:
    """A state that was saved with each of the values."""
    state = State(folder, size=8)
    for value in values:
        state.set(value)
        state.checkpointer.save_checkpoint(name=str(value))
    return state


def recovered(folder: Path) -> set[float]:
    state = State(folder, size=8)
    state.checkpointer.recover_if_possible()
    return state.values()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def fails_to_write(*_: Any) -> None:
    raise OSError(28, "No space left on device")
