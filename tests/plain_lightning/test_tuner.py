"""A Brain gets the suggestions that a plain LightningModule gets."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.tuner import Tuner

from brain_lightning import to_lightning
from tests.support.brains import loader, make, trainer_with
from tests.support.plain_modules import PlainRegression


@pytest.mark.parametrize("options", [{}, {"mode": "linear", "max_lr": 0.3}])
def test_the_learning_rate_is_that_of_a_plain_module(options: dict[str, Any]) -> None:
    found, expected = (
        Tuner(trainer_with(max_epochs=-1, enable_checkpointing=False)).lr_find(
            module, loader(), loader(), update_attr=False, **options
        )
        for module in (to_lightning(make()), PlainRegression())
    )
    assert found is not None
    assert expected is not None
    assert found.results == expected.results
    assert found.suggestion() == expected.suggestion()
    assert len(set(found.results["loss"])) > 20
