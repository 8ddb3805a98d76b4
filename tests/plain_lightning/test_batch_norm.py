"""What BatchNorm has measured for averaged weights, compared with a plain LightningModule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn

from brain_lightning import to_lightning
from tests.support.brains import Regression, loader, make, same_state, trainer_with
from tests.support.plain_modules import PlainRegression


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_averaged_weights_have_statistics_of_their_own() -> None:
    def fit(module: Any) -> None:
        averaging = StochasticWeightAveraging(0.05, swa_epoch_start=2)
        trainer = trainer_with(averaging, max_epochs=3, num_sanity_val_steps=0)
        trainer.fit(module, loader(), loader())

    plain, brain = PlainRegression(), make(Regression, max_grad_norm=0.0)
    plain.model = normed()
    brain.modules["model"] = model = normed()
    before = model[1].running_mean.clone()
    fit(plain)
    fit(to_lightning(brain))
    assert same_state(plain.model, model)
    assert not torch.equal(before, model[1].running_mean)
    # Those of one pass alone, after the training.
    assert model[1].num_batches_tracked == len(loader())
    assert model[1].momentum == 0.1
    assert not model.training
