"""SpeechBrain's own Brain on a Trainer: with patch_speechbrain or to_lightning."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import speechbrain
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.nnet.schedulers import NewBobScheduler
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.train_logger import FileTrainLogger
from torch import nn

from brain_lightning import (
    BrainTypeError,
    RunOptionError,
    UnsupportedError,
    patch_speechbrain,
    to_lightning,
)
from tests.support.brains import all_equal, loader, trainer_with, weights

OWN_FIT, OWN_EVALUATE = speechbrain.Brain.fit, speechbrain.Brain.evaluate
# SpeechBrain's own warnings.
pytestmark = pytest.mark.filterwarnings("ignore")


class Regression(speechbrain.Brain):
    def compute_forward(self, batch: Any, stage: Any) -> Any:
        return self.modules.model(batch[0])

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        assert stage in list(speechbrain.Stage)
        return nn.functional.mse_loss(predictions, batch[1])


class SubSub(type("Sub", (Regression,), {})):  # type: ignore[misc]
    pass


class Seen(Callback):
    def __init__(self) -> None:
        self.hooks: list[str] = []

    def on_train_epoch_end(self, *_: Any) -> None:
        self.hooks.append("train")

    def on_validation_end(self, *_: Any) -> None:
        self.hooks.append("valid")

    def on_test_end(self, *_: Any) -> None:
        self.hooks.append("test")


def make(cls: Any = Regression, hparams: Any = None, **run_opts: Any) -> Any:
    torch.manual_seed(0)
    return cls(
        {"model": nn.Linear(4, 2)},
        lambda parameters: torch.optim.SGD(parameters, 0.1),
        hparams,
        {"device": "cpu", "noprogressbar": True, **run_opts},
    )


@pytest.mark.parametrize("cls", [Regression, SubSub])
def test_fit_and_evaluate_run_on_a_trainer_until_the_patch_is_undone(cls: Any) -> None:
    seen = Seen()
    plain, patched = make(cls), make(cls, {"trainer": {"callbacks": [seen]}})
    plain.fit(range(2), loader(), loader())
    expected = plain.evaluate(loader())
    with patch_speechbrain():
        patched.fit(range(2), loader(), loader())
        assert patched.evaluate(loader()) == expected
    assert seen.hooks == ["valid", "train", "valid", "train", "test"]
    assert all_equal(weights(plain), weights(patched))
    assert (speechbrain.Brain.fit, speechbrain.Brain.evaluate) == (OWN_FIT, OWN_EVALUATE)
    patched.fit(range(1), loader(), loader())
    assert len(seen.hooks) == 5


def test_a_patch_may_stay_and_be_undone_by_hand() -> None:
    patch = patch_speechbrain(trainer={"max_steps": 3})
    brain = make()
    brain.fit(range(2), loader())
    patch.undo()
    patch.undo()
    assert brain.optimizer_step == 3
    assert speechbrain.Brain.fit is OWN_FIT
    assert not hasattr(speechbrain.Brain, "_lightning_defaults")


def test_arguments_of_the_patch_outrank_hparams() -> None:
    with patch_speechbrain(trainer={"max_steps": 3}):
        brain = make(hparams={"trainer": {"max_steps": 7, "limit_train_batches": 2}})
        brain.fit(range(3), loader())
    assert brain.optimizer_step == 3
    assert brain.step == 0


def test_a_trainer_of_the_users_gives_the_same_weights() -> None:
    plain, handed = make(), make()
    plain.fit(range(1, 3), loader(), loader())
    module = to_lightning(handed)
    assert module.automatic_optimization
    assert type(module).__name__ == "RegressionModule"
    trainer_with().fit(module, loader(), loader())
    assert all_equal(weights(plain), weights(handed))
    assert not all_equal(weights(plain), weights(make()))


def test_speechbrains_own_objects_work(tmp_path: Path) -> None:
    """Uses Checkpointer, DynamicItemDataset, PaddedBatch, scheduler and train logger."""

    class Padded(Regression):
        def compute_forward(self, batch: Any, stage: Any) -> Any:
            assert isinstance(batch, PaddedBatch)
            values, _ = batch.sig
            return self.modules.model(values)

        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            return predictions.square().mean()

        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            if stage == speechbrain.Stage.VALID:
                _, rate = self.hparams.annealing(stage_loss)
                speechbrain.nnet.schedulers.update_learning_rate(self.optimizer, rate)
                self.hparams.train_logger.log_stats(
                    {"epoch": epoch, "lr": rate}, valid_stats={"loss": stage_loss, "WER": 0.5}
                )
                self.checkpointer.save_and_keep_only({"WER": stage_loss}, min_keys=["WER"])

    def run(folder: Path) -> tuple[Any, str]:
        brain = make(Padded, {
            "annealing": NewBobScheduler(0.1, improvement_threshold=0.9),
            "train_logger": FileTrainLogger(str(folder / "log.txt")),
        })  # fmt: skip
        brain.checkpointer = Checkpointer(folder / "save", {"model": brain.modules.model})
        items = {str(i): {"sig": torch.full((4,), i / 10)} for i in range(8)}
        data = DynamicItemDataset(items, output_keys=["id", "sig"])
        kwargs = {"batch_size": 3, "shuffle": True}
        brain.fit(range(1, 5), data, data, train_loader_kwargs=kwargs)
        assert brain.evaluate(data, min_key="WER") >= 0
        return brain, (folder / "log.txt").read_text()

    for name in ("plain", "patched"):
        (tmp_path / name).mkdir()
    plain, log = run(tmp_path / "plain")
    logger = CSVLogger(tmp_path / "patched")
    with patch_speechbrain(trainer={"logger": logger}):
        patched, patched_log = run(tmp_path / "patched")
    assert all_equal(weights(plain), weights(patched))
    assert log == patched_log
    assert log.count("\n") == 4
    assert "valid_WER" in (Path(logger.log_dir) / "metrics.csv").read_text()


def test_what_a_recipe_reports_can_be_monitored() -> None:
    class Reports(Regression):
        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            if stage == speechbrain.Stage.VALID:
                self.hparams.train_logger.log_stats({"epoch": epoch}, {}, {"WER": epoch})

    class TrainLogger:
        def log_stats(self, stats_meta: Any, train_stats: Any, valid_stats: Any) -> None:
            pass

    stopper = EarlyStopping("WER", patience=2)
    brain = make(Reports, {"train_logger": TrainLogger(), "trainer": {"callbacks": stopper}})
    with patch_speechbrain():
        brain.fit(range(1, 10), loader(), loader())
    assert stopper.stopped_epoch == 2


def test_validation_of_every_other_epoch_is_lightnings_own_validation() -> None:
    class EveryOther(Regression):
        def _fit_valid(self, valid_set: Any, epoch: Any, enable: bool) -> None:
            if epoch % 2 == 0:
                super()._fit_valid(valid_set, epoch, enable)

    seen = Seen()
    own = speechbrain.Brain._fit_valid
    brain = make(EveryOther)
    trainer_with(seen, max_epochs=4).fit(to_lightning(brain), loader(), loader())
    assert seen.hooks == ["train", "valid", "train", "train", "valid", "train"]
    assert speechbrain.Brain._fit_valid is own
    assert "_fit_valid" not in vars(brain)


def test_data_parallel_is_refused() -> None:
    brain = make()
    brain.data_parallel_backend = True
    with pytest.raises(UnsupportedError, match="data_parallel_backend=True is not supported"):
        to_lightning(brain)


def test_options_that_somebody_chose_are_known_by_their_values() -> None:
    with patch_speechbrain(), pytest.raises(RunOptionError, match=r"max_grad_norm=2\.0 and"):
        make(max_grad_norm=2.0).fit(range(1), loader(), trainer={"gradient_clip_val": 1})


def test_a_loss_that_is_not_finite_is_skipped_as_with_our_brain() -> None:
    class NaN(Regression):
        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            loss = super().compute_objectives(predictions, batch, stage)
            return loss * torch.nan if self.step == 2 else loss

    with patch_speechbrain():
        brain = make(NaN)
        brain.fit(range(1), loader())
    assert brain.optimizer_step == 4
    assert all(weight.isfinite().all() for weight in weights(brain))


def test_a_trainer_that_the_command_line_cannot_change_is_refused() -> None:
    words = r"--trainer\.max_steps cannot change"
    with (
        patch_speechbrain(trainer={"max_steps": 3}),
        pytest.raises(BrainTypeError, match=words),
    ):
        make().fit(range(1), loader(), trainer=trainer_with())


def test_without_speechbrain_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "speechbrain.core", None)
    with pytest.raises(UnsupportedError, match="pip install speechbrain, or let the recipe"):
        patch_speechbrain()
