"""Small Brains for tests that need one side only."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from brain_lightning import Brain


def dataset(items: int = 20) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    return TensorDataset(
        torch.randn(items, 4, generator=generator), torch.randn(items, 2, generator=generator)
    )


def loader(items: int = 20, batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(dataset(items), batch_size=batch_size)


class Regression(Brain):
    """Fits a line; records its hooks in ``events``."""

    def compute_forward(self, batch: Any, stage: Any) -> Tensor:
        return self.modules.model(batch[0])

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        return nn.functional.mse_loss(predictions, batch[1])

    def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
        self.events = [*getattr(self, "events", []), ("start", stage.name, epoch)]

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        self.events = [*getattr(self, "events", []), ("end", stage.name, epoch)]


class Manual(Regression):
    def fit_batch(self, batch: Any) -> Any:
        loss = self.compute_objectives(self.compute_forward(batch, None), batch, None)
        loss.backward()
        for _ in range(2):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def sgd(parameters: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.1)


def make(
    cls: type[Brain] = Regression,
    opt_class: Any = sgd,
    hparams: dict[str, Any] | None = None,
    checkpointer: Any = None,
    **run_opts: Any,
) -> Any:
    torch.manual_seed(0)
    return cls(
        {"model": nn.Linear(4, 2)},
        opt_class,
        hparams,
        {"device": "cpu", "noprogressbar": True, **run_opts},
        checkpointer,
    )


def trainer_with(*callbacks: Any, **kwargs: Any) -> Trainer:
    """A Trainer as a user makes one, which shows and writes nothing unless asked."""
    arguments = {
        "accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
        "callbacks": list(callbacks),
    }  # fmt: skip
    return Trainer(**arguments | kwargs)


def weights(brain: Any) -> list[Tensor]:
    return [p.detach().clone() for p in brain.modules.parameters()]


def all_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def same_state(one: nn.Module, other: nn.Module) -> bool:
    state, others = one.state_dict(), other.state_dict()
    return state.keys() == others.keys() and all(
        torch.equal(state[n], others[n]) for n in state
    )
