"""Plain LightningModules that do the same as a small Brain of ``tests.support.brains``."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from tests.support.brains import sgd


class PlainRegression(LightningModule):
    """Does what ``brains.Regression`` does, and logs what a Brain's losses are called."""

    def __init__(self, opt_class: Any = sgd) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(4, 2)
        self.opt_class = opt_class

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.model(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("valid_loss", nn.functional.mse_loss(self.model(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return self.opt_class(self.parameters())
