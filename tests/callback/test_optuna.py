"""Optuna's pruning callback for Lightning prunes trials by a recipe's metrics."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from lightning.pytorch.loggers import CSVLogger
from optuna_integration import PyTorchLightningPruningCallback
from torch.utils.data import DataLoader

from brain_lightning import EpochCounter, to_lightning
from brain_lightning.stages.run import Run
from tests.support.brains import all_equal, dataset, make, trainer_with, weights
from tests.support.reporting import Reporting, rows_in


class OwnLoop(Reporting):
    def fit(self, epoch_counter: Any, train_set: Any, valid_set: Any) -> None:  # type: ignore[override]
        self.on_fit_start()
        for epoch in epoch_counter:
            self._fit_train(train_set, epoch, False)
            self._fit_valid(valid_set, epoch, False)


class NoLogger:
    def log_stats(self, stats_meta: Any, train_stats: Any, valid_stats: Any) -> None: ...


def by_dict(brain: Any, data: Any, callbacks: list[Any], logger: Any) -> None:
    trainer = {"callbacks": callbacks, "logger": logger}
    brain.fit(brain.hparams.epoch_counter, data, data, trainer=trainer)


def by_module(brain: Any, data: Any, callbacks: list[Any], logger: Any) -> None:
    trainer = trainer_with(*callbacks, max_epochs=-1, logger=logger)
    trainer.fit(to_lightning(brain), data, data)
    assert trainer.callbacks == callbacks


Fit = Callable[[Any, Any, list[Any], Any], None]


@pytest.mark.parametrize(
    ("cls", "fit"), [(Reporting, by_dict), (Reporting, by_module), (OwnLoop, by_dict)]
)
# Lightning's warnings for a user's Trainer.
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_trial_is_pruned_by_what_the_recipe_reports(
    tmp_path: Path, cls: type[Reporting], fit: Fit
) -> None:
    """The run stops after the epoch, and closes its workers and loggers."""
    brains = []

    def objective(trial: Any) -> float:
        trial.suggest_float("lr", 0, 1)
        hparams = {
            "train_logger": NoLogger(), "epoch_counter": EpochCounter(3), "killed_in": 0
        }  # fmt: skip
        brains.append(make(cls, hparams=hparams))
        pruner = PyTorchLightningPruningCallback(trial, monitor="WER")
        logger = CSVLogger(tmp_path, version=trial.number)
        # The trial that is pruned has worker processes.
        data = DataLoader(dataset(), batch_size=4, num_workers=trial.number)
        fit(brains[-1], data, [pruner], logger)
        return float(brains[-1]._lightning.records["valid_WER"]["min"][0])

    # Workers of other tests may still be running.
    workers = {*multiprocessing.active_children()}
    study = optuna.create_study(pruner=optuna.pruners.NopPruner())
    study.optimize(objective, n_trials=1)
    # WER is 29 after the first epoch, and 28 after the second.
    study.pruner = optuna.pruners.ThresholdPruner(lower=28.5)
    study.optimize(objective, n_trials=1)
    whole, pruned = study.trials
    assert (whole.state.name, whole.value) == ("COMPLETE", 27.0)
    assert pruned.state.name == "PRUNED"
    assert whole.intermediate_values == {0: 29.0, 1: 28.0, 2: 27.0}
    assert pruned.intermediate_values == {0: 29.0, 1: 28.0}
    # The logger has been closed.
    rows = rows_in(tmp_path / "lightning_logs" / "version_1")
    assert [row["valid_WER"] for row in rows if row["valid_WER"]] == ["29.0", "28.0"]
    assert {*multiprocessing.active_children()} <= workers
    assert not Run.is_running(brains[1])
    # Two epochs, and then the third.
    two, three = weights(brains[1]), weights(brains[0])
    assert not all_equal(two, three)
    fit(brains[1], DataLoader(dataset(), batch_size=4), [], False)
    assert all_equal(weights(brains[1]), three)
