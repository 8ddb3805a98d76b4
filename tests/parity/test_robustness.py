"""What recipes do to the process and to their Brain, on both sides."""

from __future__ import annotations

import pickle
import signal
from typing import Any

import pytest
import torch
from speechbrain.utils.train_logger import FileTrainLogger
from torch.optim.optimizer import register_optimizer_step_post_hook

from brain_lightning import HookStoppedError, to_lightning
from tests.support.brains import Regression
from tests.support.brains import loader as plain_loader
from tests.support.brains import make as plain_make

from .recipes import loader, make, two_modules
from .sides import OURS, SPEECHBRAIN, Record, Side, assert_equal, assert_moved, run

HOOKS_THAT_STOP = ["on_stage_start", "compute_forward", "on_fit_batch_end", "evaluate_batch"]


def both(scenario: Any) -> None:
    theirs, _ = run(SPEECHBRAIN, scenario)
    ours, _ = run(OURS, scenario)
    assert_equal(ours, theirs)
    assert_moved(ours)


@pytest.mark.parametrize("hook", HOOKS_THAT_STOP)
def test_a_stop_iteration_of_a_hook_reaches_the_caller(hook: str) -> None:
    def scenario(side: Side, record: Record) -> Any:
        def stopping(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.optimizer_step == 5 and not self.stopped:
                self.stopped = True
                raise StopIteration("the recipe's own iterator ran dry")
            return getattr(side.Brain, hook)(self, *args, **kwargs)

        def forward(self: Any, batch: Any, stage: Any) -> Any:
            if hook == "compute_forward" and self.optimizer_step == 5 and not self.stopped:
                self.stopped = True
                raise StopIteration("the recipe's own iterator ran dry")
            return self.modules.head(self.modules.encoder(batch[0]))

        hooks = {"compute_forward": forward} if hook == "compute_forward" else {hook: stopping}
        brain = make(side, record, two_modules(0.2), stopped=False, **hooks)
        with pytest.raises(StopIteration, match="ran dry"):
            brain.fit(side.EpochCounter(3), loader(record, brain), loader(record, brain))
        record.results.append((brain.step, brain.optimizer_step, brain.stopped))
        return brain

    both(scenario)


def test_on_a_trainer_of_ones_own_it_is_an_error_too() -> None:
    from lightning.pytorch import Trainer

    class Stopping(Regression):
        def compute_forward(self, batch: Any, stage: Any) -> Any:
            return next(iter(()))

    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(HookStoppedError):
        trainer.fit(to_lightning(plain_make(Stopping)), plain_loader(), plain_loader())


def test_anomaly_detection_around_a_fit_stays_in_force() -> None:
    def scenario(side: Side, record: Record) -> Any:
        def on_fit_batch_end(self: Any, *_: Any) -> None:
            record.results.append(torch.is_anomaly_enabled())

        brain = make(side, record, on_fit_batch_end=on_fit_batch_end)
        with torch.autograd.set_detect_anomaly(True):
            brain.fit(side.EpochCounter(1), loader(record, brain))
        assert record.results[0]
        return brain

    both(scenario)


def test_a_hook_of_one_instance_is_called() -> None:
    def scenario(side: Side, record: Record) -> Any:
        brain = make(side, record, two_modules(0.2))
        inner = brain.fit_batch

        def fit_batch(batch: Any) -> Any:
            record.results.append(brain.step)
            return inner(batch)

        brain.fit_batch = fit_batch
        brain.fit(side.EpochCounter(2), loader(record, brain), loader(record, brain))
        assert len(record.results) == 10
        return brain

    both(scenario)


def test_signals_are_left_alone() -> None:
    def scenario(side: Side, record: Record) -> Any:
        def handler(*_: Any) -> None:
            """The recipe's own."""

        def on_fit_batch_end(self: Any, *_: Any) -> None:
            current = signal.getsignal(signal.SIGTERM)
            record.results.append((current is signal.SIG_DFL, current is handler))
            signal.signal(signal.SIGTERM, handler)

        brain = make(side, record, on_fit_batch_end=on_fit_batch_end)
        brain.fit(side.EpochCounter(1), loader(record, brain))
        record.results.append(signal.getsignal(signal.SIGTERM) is handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert record.results[0] == (True, False)
        return brain

    both(scenario)


def test_private_helpers_that_recipes_call_are_there() -> None:
    def scenario(side: Side, record: Record) -> Any:
        def on_fit_start(self: Any) -> None:
            self._compile()
            self._wrap_distributed()
            self.init_optimizers()

        def make_dataloader(self: Any, dataset: Any, stage: Any, **kwargs: Any) -> Any:
            if stage.name == "TRAIN":
                kwargs = self._train_loader_specifics(dataset, kwargs)
            kwargs.pop("ckpt_prefix", None)
            return torch.utils.data.DataLoader(dataset, **kwargs)

        brain = make(side, record, on_fit_start=on_fit_start, make_dataloader=make_dataloader)
        kwargs = {"batch_size": 4, "shuffle": True}
        data = loader(record, brain).dataset
        brain.fit(side.EpochCounter(2), data, data, train_loader_kwargs=kwargs)
        return brain

    both(scenario)


def test_a_counter_by_getitem_alone() -> None:
    class Counter:
        def __getitem__(self, index: int) -> int:
            if index == 2:
                raise IndexError
            return index + 1

    def scenario(side: Side, record: Record) -> Any:
        brain = make(side, record)
        brain.fit(Counter(), loader(record, brain))
        return brain

    both(scenario)


def test_optimizer_hooks_of_torch_see_each_step_once() -> None:
    def scenario(side: Side, record: Record) -> Any:
        brain = make(side, record)
        handle = register_optimizer_step_post_hook(
            lambda optimizer, *_: record.results.append(type(optimizer).__name__)
        )
        try:
            brain.fit(side.EpochCounter(1), loader(record, brain))
        finally:
            handle.remove()
        assert record.results == ["Adam"] * 5
        return brain

    both(scenario)


def test_a_train_logger_can_be_pickled_in_a_hook(tmp_path: Any) -> None:
    def scenario(side: Side, record: Record) -> Any:
        def on_stage_end(self: Any, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            self.hparams.train_logger.log_stats({"epoch": epoch}, {"loss": stage_loss})
            copied = pickle.loads(pickle.dumps(self.hparams.train_logger))  # noqa: S301
            record.results.append(type(copied).__name__)

        logger = FileTrainLogger(str(tmp_path / f"{side.name}.txt"))
        hparams = {"train_logger": logger}
        brain = make(side, record, hparams=hparams, on_stage_end=on_stage_end)
        brain.fit(side.EpochCounter(2), loader(record, brain))
        return brain

    both(scenario)
    assert (tmp_path / "speechbrain.txt").read_text() == (
        tmp_path / "brain_lightning.txt"
    ).read_text()


def test_variables_of_slurm_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")

    def scenario(side: Side, record: Record) -> Any:
        brain = make(side, record)
        brain.fit(side.EpochCounter(1), loader(record, brain))
        return brain

    both(scenario)


def test_gradients_are_on_within_a_fit_and_as_before_after_it() -> None:
    """A row of the README where the sides differ: SpeechBrain fails under no_grad."""
    brain = plain_make()
    with torch.no_grad():
        brain.fit(range(1), plain_loader())
        assert not torch.is_grad_enabled()
    assert brain.optimizer_step == 5


def test_a_batch_that_is_none_is_left_out_of_training() -> None:
    """A row of the README where the sides differ."""
    brain = plain_make()
    batches = [batch if index != 2 else None for index, batch in enumerate(plain_loader())]
    data = torch.utils.data.DataLoader(
        batches, batch_size=None, collate_fn=lambda batch: batch
    )
    with pytest.warns(UserWarning, match="yielded None"):
        brain.fit(range(1), data)
    assert brain.optimizer_step == 4
