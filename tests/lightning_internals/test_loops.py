"""Behaviour of Lightning on which the loops rely, and restoring after a run."""

from __future__ import annotations

import inspect

from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource

from brain_lightning import to_lightning
from tests.support.brains import all_equal, loader, make, trainer_with, weights


def test_the_fit_loop_asks_done_before_each_epoch() -> None:
    assert isinstance(_FitLoop.done, property)
    run = inspect.getsource(_FitLoop.run)
    assert "if self.skip:" in run
    assert "while not self.done:" in run


def test_lightning_does_not_warn_of_a_brain_that_was_in_eval_mode() -> None:
    brain = make()
    brain.modules.eval()
    before = weights(brain)
    trainer_with(max_epochs=1).fit(to_lightning(brain), loader(), loader())
    assert not all_equal(before, weights(brain))


def test_a_source_of_loaders_has_an_instance_and_a_name() -> None:
    source = _DataLoaderSource([1], "train_dataloader")
    assert source.dataloader() == [1]
    trainer = trainer_with()
    for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop, trainer.test_loop):
        assert isinstance(loop._data_source, _DataLoaderSource)
        assert loop._combined_loader is None


def test_the_counters_exist() -> None:
    loop = trainer_with().fit_loop
    for progress in (
        loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step,
        loop.epoch_loop.manual_optimization.optim_step_progress,
    ):
        assert (progress.total.ready, progress.current.completed) == (0, 0)
    assert loop.epoch_loop.batch_progress.is_last_batch is False
    assert isinstance(loop._can_stop_early, bool)


def test_the_loops_are_lightnings_own_again_after_a_run() -> None:
    trainer = trainer_with(max_epochs=1)
    before = [trainer.fit_loop._data_source, trainer.test_loop._data_source]
    brain = make()
    brain.fit(range(3), loader(), loader(), trainer=trainer)
    assert type(trainer.fit_loop) is _FitLoop
    assert [trainer.fit_loop._data_source, trainer.test_loop._data_source] == before
    assert "brain_run" not in vars(trainer.fit_loop)
