"""Small Brains to run on both sides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from .sides import Record, Side, TracedLoader, attach

FEATURES, CLASSES, ITEMS = 6, 3, 20


def dataset(items: int = ITEMS) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(items, FEATURES, generator=generator)
    return TensorDataset(inputs, inputs[:, :CLASSES].argmax(dim=1))


class Stream(IterableDataset[Any]):
    """Items without a length, some of them made with random numbers."""

    def __init__(self, items: int = ITEMS) -> None:
        self.data = dataset(items)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.data:  # type: ignore[attr-defined]
            yield x + 0.1 * torch.randn(FEATURES), y


class Noisy(Dataset[Any]):
    """Items augmented with random numbers of the process that loads them."""

    def __init__(self) -> None:
        self.data = dataset()

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.data[index]
        return x + 0.1 * torch.randn(FEATURES), y


class ChangingBatches:
    """A batch sampler whose length is another one in every epoch."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = list(lengths)
        self.passes = 0

    def __len__(self) -> int:
        return self.lengths[min(self.passes, len(self.lengths) - 1)]

    def __iter__(self) -> Iterator[list[int]]:
        length = len(self)
        self.passes += 1
        yield from ([i % ITEMS, (i + 5) % ITEMS] for i in range(length))


class CountsSaves:
    """What a recipe's interval saves ask of a checkpointer."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def add_recoverable(self, *_: Any, **__: Any) -> None:
        pass

    def recover_if_possible(self, **_: Any) -> None:
        pass

    def save_and_keep_only(self, **kwargs: Any) -> None:
        self.record.results.append(sorted(kwargs))


def loader(record: Record, brain: Any, data: Any = None, **kwargs: Any) -> TracedLoader:
    data = dataset() if data is None else data
    if "batch_sampler" not in kwargs:
        kwargs.setdefault("batch_size", 4)
    return TracedLoader(data, **kwargs).traced(record, brain)


def classifier(side: Side, **namespace: Any) -> Any:
    """A Brain class that classifies, with hooks overridden by ``namespace``."""

    class Classifier(side.Brain):
        def compute_forward(self, batch: Any, stage: Any) -> Tensor:
            x = batch[0]
            for module in self.modules.children():
                x = module(x)
            return x

        def compute_objectives(self, predictions: Tensor, batch: Any, stage: Any) -> Tensor:
            return nn.functional.cross_entropy(predictions, batch[1])

    return type("Classifier", (Classifier,), namespace)


def adam(parameters: Any) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=0.01)


def one_module() -> dict[str, nn.Module]:
    return {"model": nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))}


def two_modules(dropout: float = 0.0) -> dict[str, nn.Module]:
    return {
        "encoder": nn.Sequential(
            nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Dropout(dropout)
        ),
        "head": nn.Linear(8, CLASSES),
    }


def make(
    side: Side,
    record: Record,
    modules: dict[str, nn.Module] | None = None,
    opt_class: Any = adam,
    run_opts: dict[str, Any] | None = None,
    hparams: dict[str, Any] | None = None,
    checkpointer: Any = None,
    **namespace: Any,
) -> Any:
    """A recorded classifier on the CPU, without bar."""
    brain = classifier(side, **namespace)(
        modules=one_module() if modules is None else modules,
        opt_class=opt_class,
        hparams=hparams if hparams is not None else {},
        run_opts={"device": "cpu", "noprogressbar": True, **(run_opts or {})},
        checkpointer=checkpointer,
    )
    attach(record, brain)
    return brain
