"""Data whose every fetch is an event, for runs that are interrupted anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    default_collate,
    get_worker_info,
)

from .events import Events
from .resuming import drawn


def noise(x: Tensor) -> Tensor:
    """From all three generators."""
    return torch.randn_like(x) * np.random.rand() * 0.1 + drawn() * 0.1


class Examples(Dataset[Any]):
    """Noisy, and each is an event, in the process of the run at least."""

    def __init__(self, items: int, events: Events, stage: str) -> None:
        generator = torch.Generator().manual_seed(items)
        self.inputs = torch.randn(items, 4, generator=generator)
        self.events, self.stage = events, stage

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        with self._event("fetch", index):
            x = self.inputs[index]
            return x + noise(x), x[:1]

    def collate(self, samples: list[Any]) -> Any:
        with self._event("collate"):
            return default_collate(samples)

    def _event(self, name: str, which: Any = None) -> AbstractContextManager[None]:
        if get_worker_info() is not None:
            return nullcontext()
        return self.events(f"{name} {self.stage}", which)


class Items(IterableDataset[Any]):
    """Examples one after the other, by turns of the workers, with a position."""

    def __init__(self, items: int, events: Events) -> None:
        self.examples, self.done = Examples(items, events, "TRAIN"), 0

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        mine = range(worker, len(self.examples), workers)
        while self.done < len(mine):
            item = self.examples[mine[self.done]]
            self.done += 1
            yield item
        self.done = 0

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class StatefulLoader(DataLoader[Any]):
    """A loader of a user's: it has no length, but a position."""

    def __init__(self, batches: int, events: Events) -> None:
        super().__init__(Items(2 * batches, events), 2)
        self.batches, self.events, self.done = batches, events, 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        while self.done < self.batches:
            with self.events("fetch TRAIN", self.done):
                self.done += 1
                x = torch.full((2, 4), self.done / self.batches)
                batch = x + noise(x), x[:, :1]
            yield batch
        self.done = 0

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]
