"""Every callback that Lightning ships: works, asserted by its effect, or is refused in words.

``python -m pytest tests/callback/test_lightning_callbacks.py -v`` prints the matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as callbacks
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from brain_lightning import Brain, EpochCounter, UnsupportedError, to_lightning
from tests.support.brains import (
    Regression,
    all_equal,
    loader,
    make,
    sgd,
    trainer_with,
    weights,
)
from tests.support.rows import Table, call
from tests.support.upstream import needs_lightning, weights_only

# Lightning warns about workers, loggers and similar settings.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

# Base classes, which do nothing by themselves.
BASES = {"BaseFinetuning", "Callback", "Checkpoint", "ProgressBar"}
ROWS = Table()


def fit(brain: Any, *given: Any, **kwargs: Any) -> Trainer:
    trainer = trainer_with(*given, **{"max_epochs": 3} | kwargs)
    trainer.fit(to_lightning(brain), loader(), loader())
    return trainer


class Snapshots(Regression):
    """Remembers its weights after each update and the learning rate before it."""

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        self.rates = [*getattr(self, "rates", []), self.optimizer.param_groups[0]["lr"]]

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        self.seen = [*getattr(self, "seen", []), weights(self)]


class TwoParts(Regression):
    """Has a head, and a backbone that is not in the optimizer yet."""

    def compute_forward(self, batch: Any, stage: Any) -> Tensor:
        return self.modules.head(self.modules.backbone(batch[0]))

    def init_optimizers(self) -> None:
        self.optimizer = sgd(self.modules.head.parameters())
        self.optimizers_dict = {"head": self.optimizer}


def two_parts(cls: type[Brain] = TwoParts) -> Any:
    torch.manual_seed(0)
    modules = {"backbone": nn.Linear(4, 4), "head": nn.Linear(4, 2)}
    return cls(modules, sgd, None, {"device": "cpu", "noprogressbar": True})


@ROWS.row("EarlyStopping", "works")
def early_stopping(tmp_path: Path) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.4, 1.0])

    class Planned(Regression):
        def evaluate_batch(self, batch: Any, stage: Any) -> Tensor:
            return torch.tensor(self.planned)

        def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
            super().on_stage_start(stage, epoch)
            if stage.name == "VALID":
                self.planned = next(losses)

    counter = EpochCounter(5)
    brain = make(Planned, hparams={"epoch_counter": counter})
    fit(brain, callbacks.EarlyStopping("valid_loss", patience=2), max_epochs=-1)
    assert counter.current == 4
    assert brain.events[-1] == ("end", "VALID", 4)


@ROWS.row("ModelCheckpoint", "works")
def model_checkpoint(tmp_path: Path) -> None:
    class Remembering(Regression):
        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            super().on_stage_end(stage, stage_loss, epoch)
            if stage.name == "VALID":
                self.kept = {**getattr(self, "kept", {}), stage_loss: weights(self)}

    brain = make(Remembering, opt_class=lambda p: torch.optim.SGD(p, lr=1.5))
    saving = callbacks.ModelCheckpoint(tmp_path, monitor="valid_loss", save_top_k=2)
    fit(brain, saving, enable_checkpointing=True, max_epochs=5)
    best = sorted(brain.kept)[:2]
    assert len(set(brain.kept)) == 5
    assert len(list(tmp_path.glob("*.ckpt"))) == 2
    scores = sorted(float(score) for score in saving.best_k_models.values())
    assert scores == pytest.approx(best)
    module = type(to_lightning(brain)).load_from_checkpoint(
        saving.best_model_path, brain=make(Remembering), **weights_only(False)
    )
    assert all_equal(weights(module.brain), brain.kept[best[0]])


@ROWS.row("OnExceptionCheckpoint", "works")
def on_exception_checkpoint(tmp_path: Path) -> None:
    class Failing(Regression):
        def on_fit_batch_end(self, *_: Any) -> None:
            if self.optimizer_step == 3:
                raise RuntimeError("power cut")

    brain = make(Failing)
    saving = callbacks.OnExceptionCheckpoint(tmp_path)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(brain, saving, enable_checkpointing=True)
    module = type(to_lightning(brain)).load_from_checkpoint(
        saving.ckpt_path, brain=make(), **weights_only(False)
    )
    assert all_equal(weights(module.brain), weights(brain))


@ROWS.row("LearningRateMonitor", "works")
def learning_rate_monitor(tmp_path: Path) -> None:
    class Two(TwoParts):
        def init_optimizers(self) -> None:
            self.optimizers_dict = {
                "encoder": torch.optim.Adam(self.modules.backbone.parameters(), 0.01),
                "head": torch.optim.SGD(self.modules.head.parameters(), 0.1),
            }

    monitor = callbacks.LearningRateMonitor(logging_interval="epoch")
    trainer = fit(two_parts(Two), monitor, logger=CSVLogger(tmp_path))
    assert monitor.lrs == {
        "lr-OptimizerGroup/encoder": [0.01] * 3,
        "lr-OptimizerGroup/head": [0.1] * 3,
    }
    assert "lr-OptimizerGroup/head" in (Path(trainer.log_dir) / "metrics.csv").read_text()


@ROWS.row("StochasticWeightAveraging", "works")
def stochastic_weight_averaging(tmp_path: Path) -> None:
    class PerEpoch(Snapshots):
        def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
            if stage.name == "TRAIN":
                self.epochs = [*getattr(self, "epochs", []), weights(self)]

    brain = make(PerEpoch)
    fit(brain, callbacks.StochasticWeightAveraging(0.1, swa_epoch_start=2), max_epochs=4)
    # Lightning averages the weights at the start of each epoch, from the second one on.
    averaged = [torch.stack(ws).mean(dim=0) for ws in zip(*brain.epochs[1:], strict=True)]
    for weight, expected in zip(weights(brain), averaged, strict=True):
        assert torch.allclose(weight, expected, atol=1e-6)


def ema(seen: list[list[Tensor]], decay: float) -> list[Tensor]:
    average = seen[0]
    for current in seen[1:]:
        average = [a.lerp(c, 1 - decay) for a, c in zip(average, current, strict=True)]
    return average


@ROWS.row("EMAWeightAveraging", "works", needs_lightning("2.6"))
def ema_weight_averaging(tmp_path: Path) -> None:
    brain = make(Snapshots)
    fit(brain, callbacks.EMAWeightAveraging(decay=0.9))
    for weight, expected in zip(weights(brain), ema(brain.seen, 0.9), strict=True):
        assert torch.allclose(weight, expected, atol=1e-6)


@ROWS.row("WeightAveraging", "works", needs_lightning("2.6"))
def weight_averaging(tmp_path: Path) -> None:
    brain = make(Snapshots)
    fit(brain, callbacks.WeightAveraging())
    averaged = [torch.stack(ws).mean(dim=0) for ws in zip(*brain.seen, strict=True)]
    for weight, expected in zip(weights(brain), averaged, strict=True):
        assert torch.allclose(weight, expected, atol=1e-6)


@ROWS.row("GradientAccumulationScheduler", "works")
def gradient_accumulation_scheduler(tmp_path: Path) -> None:
    class Steps(Regression):
        def on_fit_batch_end(
            self, batch: Any, outputs: Any, loss: Any, should_step: bool
        ) -> None:
            self.steps = [*getattr(self, "steps", []), should_step]

    brain = make(Steps)
    trainer = fit(brain, callbacks.GradientAccumulationScheduler({0: 2, 1: 3, 2: 1}))
    assert brain.steps[:5] == [False, True, False, True, True]
    assert brain.steps[5:10] == [False, False, True, False, True]
    assert brain.steps[10:] == [True] * 5
    assert trainer.global_step == brain.optimizer_step == 10
    assert brain.grad_accumulation_factor == 1


@ROWS.row("BackboneFinetuning", "works")
def backbone_finetuning(tmp_path: Path) -> None:
    class Watched(TwoParts):
        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            if stage.name == "TRAIN":
                self.backbones = [*getattr(self, "backbones", []), weights(self)[:2]]

    brain = two_parts(Watched)
    start = weights(brain)[:2]
    fit(
        brain,
        callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.05),
    )
    assert all_equal(brain.backbones[0], start)
    assert not all_equal(brain.backbones[1], start)
    assert len(brain.optimizer.param_groups) == 2
    assert brain.optimizer.param_groups[0]["lr"] == 0.1


@ROWS.row("ModelPruning", "works")
def model_pruning(tmp_path: Path) -> None:
    brain = make()
    pruning = callbacks.ModelPruning(
        "l1_unstructured", parameters_to_prune=[(brain.modules.model, "weight")], amount=0.5
    )
    fit(brain, pruning, max_epochs=1)
    weight = brain.modules.model.weight
    assert int((weight == 0).sum()) == weight.numel() // 2


@ROWS.row("Timer", "works")
def timer(tmp_path: Path, clock: Any) -> None:
    class Slow(Regression):
        def on_fit_batch_end(self, *_: Any) -> None:
            clock.now += 0.2

    brain = make(Slow)
    watch = callbacks.Timer(duration={"milliseconds": 100})
    fit(brain, watch, max_epochs=5)
    assert brain.optimizer_step == 1
    assert brain.events[-1] == ("end", "VALID", 1)
    assert watch.time_elapsed("train") > 0


@ROWS.row("TQDMProgressBar", "works")
def tqdm_progress_bar(tmp_path: Path, capsys: Any) -> None:
    fit(make(), callbacks.TQDMProgressBar(), enable_progress_bar=True, max_epochs=1)
    shown = capsys.readouterr()
    assert "Epoch 1/1: 100%" in shown.out + shown.err
    assert "5/5" in shown.out + shown.err


@ROWS.row("RichProgressBar", "works", needs_lightning("2.5.3"))
def rich_progress_bar(tmp_path: Path, capsys: Any) -> None:
    fit(make(), callbacks.RichProgressBar(), enable_progress_bar=True, max_epochs=1)
    assert "5/5" in capsys.readouterr().out


@ROWS.row("ModelSummary", "works")
def model_summary(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level("INFO"):
        fit(make(), callbacks.ModelSummary(max_depth=2), max_epochs=1)
    assert "brain_modules" in caplog.text
    assert "10 " in caplog.text


@ROWS.row("RichModelSummary", "works")
def rich_model_summary(tmp_path: Path, capsys: Any) -> None:
    fit(make(), callbacks.RichModelSummary(), max_epochs=1)
    assert "brain_modules" in capsys.readouterr().out


@ROWS.row("DeviceStatsMonitor", "works")
def device_stats_monitor(tmp_path: Path) -> None:
    trainer = fit(
        make(), callbacks.DeviceStatsMonitor(cpu_stats=True),
        logger=CSVLogger(tmp_path), log_every_n_steps=1, max_epochs=1,
    )  # fmt: skip
    assert "cpu_percent" in (Path(trainer.log_dir) / "metrics.csv").read_text()


@ROWS.row("ThroughputMonitor", "works")
def throughput_monitor(tmp_path: Path) -> None:
    monitor = callbacks.ThroughputMonitor(
        batch_size_fn=lambda batch: len(batch[0]), window_size=2
    )
    trainer = fit(
        make(), monitor, logger=CSVLogger(tmp_path), log_every_n_steps=1, max_epochs=1
    )
    assert "train/samples" in (Path(trainer.log_dir) / "metrics.csv").read_text()


@ROWS.row("SpikeDetection", "works")
def spike_detection(tmp_path: Path) -> None:
    from lightning.fabric.utilities.spike import TrainingSpikeException
    from lightning.pytorch.callbacks.spike import SpikeDetection

    class Spiking(Regression):
        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            loss = super().compute_objectives(predictions, batch, stage)
            return loss * (1e4 if self.optimizer_step == 8 else 1)

    watching = SpikeDetection(
        mode="min", window=3, warmup=1, atol=10.0, finite_only=True,
        exclude_batches_path=str(tmp_path / "skip.json"),
    )  # fmt: skip
    brain = make(Spiking)
    with pytest.raises(TrainingSpikeException):
        fit(brain, watching)
    assert brain.optimizer_step == 9


@ROWS.row("LambdaCallback", "works")
def lambda_callback(tmp_path: Path) -> None:
    seen: list[int] = []
    fit(make(), callbacks.LambdaCallback(on_train_epoch_end=lambda t, m: seen.append(1)))
    assert seen == [1, 1, 1]


@ROWS.row("BasePredictionWriter", "works")
def prediction_writer(tmp_path: Path) -> None:
    class Writer(callbacks.BasePredictionWriter):
        def write_on_epoch_end(
            self, trainer: Any, module: Any, predictions: Any, _: Any
        ) -> None:
            torch.save(predictions, tmp_path / "predictions.pt")

    brain = make()
    trainer_with(Writer("epoch")).predict(to_lightning(brain), loader())
    written = torch.load(tmp_path / "predictions.pt")
    expected = [brain.modules.model(batch[0]).detach() for batch in loader()]
    assert all_equal(written, expected)


@ROWS.row("LearningRateFinder", "works")
def learning_rate_finder(tmp_path: Path) -> None:
    brain, finder = make(), callbacks.LearningRateFinder(num_training_steps=20)
    fit(brain, finder)
    assert brain.optimizer.param_groups[0]["lr"] == finder.optimal_lr.suggestion()


@ROWS.row("BatchSizeFinder", "works")
def batch_size_finder(tmp_path: Path) -> None:
    finder, data = callbacks.BatchSizeFinder(init_val=1), loader()
    trainer_with(finder, max_epochs=1).fit(to_lightning(make()), data)
    assert finder.optimal_batch_size == data.batch_size == 20


@ROWS.parametrize()
def test_matrix(test: Callable[..., None], tmp_path: Path, request: Any) -> None:
    before = weights(make())
    call(test, request)
    assert all_equal(before, weights(make()))


def test_every_callback_of_lightning_has_a_row() -> None:
    assert set(callbacks.__all__) - BASES <= set(ROWS)


# ------------------------------------- learning rates, and partly unsupported callbacks


class Annealing(Snapshots):
    """Sets the learning rate of the next epoch at the end of an epoch, as recipes do."""

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        if stage.name == "VALID":
            for group in self.optimizer.param_groups:
                group["lr"] = 0.1 / (epoch + 1)


ANNEALED_WITH = [
    lambda: callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=1),
    pytest.param(lambda: callbacks.EMAWeightAveraging(), marks=needs_lightning("2.6")),
    pytest.param(lambda: callbacks.WeightAveraging(), marks=needs_lightning("2.6")),
    lambda: callbacks.GradientAccumulationScheduler({0: 1}),
    lambda: callbacks.EarlyStopping("valid_loss", patience=9),
]


@pytest.mark.parametrize("callback", ANNEALED_WITH)
def test_a_recipes_own_annealing_survives(callback: Callable[[], Any]) -> None:
    brain = make(Annealing)
    fit(brain, callback())
    assert brain.rates == [0.1] * 5 + [0.05] * 5 + [0.1 / 3] * 5


def test_averaging_without_end_is_refused_by_old_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("brain_lightning.callback.unsupported.AVERAGES_WITHOUT_END", False)
    averaging = callbacks.StochasticWeightAveraging(0.1, swa_epoch_start=2)
    with pytest.raises(UnsupportedError, match=r"Lightning 2\.6\.1.*Set max_epochs"):
        make().fit(range(3), loader(), trainer={"callbacks": [averaging]})


@needs_lightning("2.6.1")
def test_averaging_ends_with_the_epoch_counter() -> None:
    class PerEpoch(Regression):
        def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
            self.epochs = [*getattr(self, "epochs", []), weights(self)]

    brain = make(PerEpoch)
    averaging = callbacks.StochasticWeightAveraging(0.1, swa_epoch_start=2)
    brain.fit(range(3), loader(), trainer={"callbacks": [averaging]})
    averaged = [torch.stack(ws).mean(dim=0) for ws in zip(*brain.epochs[1:], strict=True)]
    for weight, expected in zip(weights(brain), averaged, strict=True):
        assert torch.allclose(weight, expected, atol=1e-6)


def test_an_average_that_was_not_taken_is_warned_of() -> None:
    averaging = callbacks.StochasticWeightAveraging(0.1, swa_epoch_start=1)
    brain = make(hparams={"epoch_counter": range(2)})
    with pytest.warns(UserWarning, match=r"in epoch 5, but the run ended after epoch 2"):
        fit(brain, averaging, max_epochs=5)


@pytest.mark.parametrize("max_epochs", [pytest.param(-1, marks=needs_lightning("2.6.1")), 5])
def test_without_an_average_the_weights_stay(max_epochs: int) -> None:
    brain = make(Snapshots, hparams={"epoch_counter": range(2)})
    averaging = callbacks.StochasticWeightAveraging(0.1, swa_epoch_start=4)
    with pytest.warns(UserWarning, match=r"starts in epoch 4, but .* ended after epoch 2"):
        fit(brain, averaging, max_epochs=max_epochs)
    assert all_equal(weights(brain), brain.seen[-1])


def test_a_copy_of_the_module_has_weights_of_its_own() -> None:
    brain = make(hparams={"epoch_counter": iter([1, 2])})
    copied = copy.deepcopy(to_lightning(brain))
    assert all_equal(weights(copied.brain), weights(brain))
    copied.brain.modules.model.weight.data.zero_()
    assert not all_equal(weights(copied.brain), weights(brain))
    assert copied.brain.hparams is brain.hparams
