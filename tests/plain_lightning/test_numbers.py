"""The numbers of a step and of an epoch, where a plain LightningModule has them."""

from __future__ import annotations

import csv
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from brain_lightning import Brain, EpochCounter, to_lightning
from tests.support.brains import Regression, loader, make, same_state, trainer_with
from tests.support.plain_modules import PlainRegression


class ByHand(Regression):
    def fit_batch(self, batch: Any) -> Any:
        return super().fit_batch(batch)


class PlainByHand(PlainRegression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


# Lightning warns of a set that is missing, and of modules that log at every step.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PAIRS = [(PlainRegression, Regression), (PlainByHand, ByHand)]


class Reading(Callback):
    """What a callback reads, when it is told of a batch, a validation and an epoch."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, float]]] = []

    def _read(self, trainer: Trainer, hook: str) -> None:
        names = ("train_loss", "train_loss_step")
        for metrics in (trainer.callback_metrics, trainer.logged_metrics):
            self.seen.append((hook, {n: float(metrics[n]) for n in names if n in metrics}))

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._read(trainer, "batch starts")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._read(trainer, "batch ends")

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        self._read(trainer, "validation starts")


class WithinEpoch(EarlyStopping):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._run_early_stopping_check(trainer)


def same_weights(plain: PlainRegression, brain: Any) -> bool:
    return same_state(plain.model, brain.modules["model"])


@pytest.mark.parametrize(("plain_class", "brain_class"), PAIRS)
def test_a_callback_reads_the_loss_of_the_step(
    plain_class: type[PlainRegression], brain_class: type[Brain]
) -> None:
    plain, brain, seen = plain_class(), make(brain_class), []
    for module in (plain, to_lightning(brain)):
        reading = Reading()
        arguments = {"val_check_interval": 2, "limit_val_batches": 1, "max_epochs": 1}
        trainer = trainer_with(reading, **arguments, num_sanity_val_steps=0)
        trainer.fit(module, loader(), loader())
        seen.append((reading.seen, float(trainer.callback_metrics["train_loss_step"])))
    assert seen[0] == seen[1]
    read = [values["train_loss"] for _, values in seen[0][0] if "train_loss" in values]
    assert len(set(read)) == 5
    assert same_weights(plain, brain)


def test_the_loss_of_a_step_stays_a_tensor_that_nobody_has_waited_for() -> None:
    class OnDevice(Regression):
        def fit_batch(self, batch: Any) -> Any:
            self.last = super().fit_batch(batch)
            return self.last

    class Same(Callback):
        def __init__(self) -> None:
            self.found: list[bool] = []

        def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
            read = trainer.callback_metrics["train_loss_step"]
            self.found.append(read.data_ptr() == module.brain.last.data_ptr())

    same = Same()
    trainer_with(same, max_epochs=1).fit(to_lightning(make(OnDevice)), loader())
    assert same.found == [True] * 5


@pytest.mark.parametrize("loss", [None, 0, 0.5, torch.ones(1, dtype=torch.bfloat16)])
def test_what_a_fit_batch_of_the_recipes_own_returns(loss: Any) -> None:
    class Returning(Regression):
        def fit_batch(self, batch: Any) -> Any:
            super().fit_batch(batch)
            return loss

        def update_average(self, loss: Any, avg_loss: float) -> float:
            return 0.0

    class Seeing(Callback):
        seen: Any = None

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            self.seen = trainer.callback_metrics.get("train_loss")

    seeing = Seeing()
    trainer_with(seeing, max_epochs=1).fit(to_lightning(make(Returning)), loader())
    if loss is None:
        assert seeing.seen is None
    else:
        assert seeing.seen.dtype == torch.float32
        assert seeing.seen.shape == ()
        assert float(seeing.seen) == float(loss)


def test_callbacks_act_on_the_loss_within_the_epoch(tmp_path: Path) -> None:
    found = []
    for number, module in enumerate((PlainRegression(), to_lightning(make()))):
        saving = ModelCheckpoint(
            tmp_path / str(number), filename="{step}-{train_loss:.3f}", save_top_k=2,
            monitor="train_loss_step", every_n_train_steps=2,
        )  # fmt: skip
        stopping = WithinEpoch("train_loss", patience=3, min_delta=0.2)
        trainer = trainer_with(stopping, saving, max_epochs=4, enable_checkpointing=True)
        trainer.fit(module, loader(80))
        # Not the one of ours, of the moment at which the epoch was ended.
        names = sorted(path.name for path in (tmp_path / str(number)).glob("step=*"))
        score = float(stopping.best_score), float(saving.best_model_score or 0)
        found.append((names, trainer.global_step, stopping.stopped_epoch, score))
    assert found[0] == found[1]
    assert len(found[0][0]) == 2
    assert 4 < found[0][1] < 80


@pytest.mark.parametrize(("plain_class", "brain_class"), PAIRS)
@pytest.mark.parametrize(
    "trigger",
    [
        {"every_n_train_steps": 3}, {"train_time_interval": timedelta(microseconds=1)},
        {"every_n_train_steps": 3, "monitor": "train_loss_step"},
    ],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_is_saved_whoever_makes_the_steps(
    trigger: Any, plain_class: type[PlainRegression], brain_class: type[Brain], tmp_path: Path
) -> None:
    names = []
    # With manual optimization Lightning 2.6 ignores a time.
    plain = PlainRegression() if "train_time_interval" in trigger else plain_class()
    for number, module in enumerate((plain, to_lightning(make(brain_class)))):
        folder = tmp_path / str(number)
        saving = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **trigger)
        trainer_with(saving, enable_checkpointing=True).fit(module, loader())
        names.append(sorted(path.name for path in folder.iterdir()))
    assert names[0] == names[1]
    assert len(names[0]) >= 3


def axis(trainer: Trainer) -> dict[str, list[tuple[int, float]]]:
    path = Path(str(trainer.log_dir)) / "metrics.csv"
    found: dict[str, list[tuple[int, float]]] = {}
    for row in csv.DictReader(path.open()):
        for name, value in row.items():
            if value and name != "step":
                name = "lr" if name.startswith("lr-") else name
                found.setdefault(name, []).append((int(row["step"]), float(value)))
    return found


@pytest.mark.parametrize(
    ("arguments", "batches"), [({}, 5), ({"accumulate_grad_batches": 2}, 7)], ids=str
)
def test_loggers_count_updates(arguments: Any, batches: int, tmp_path: Path) -> None:
    found, plain, brain = [], PlainRegression(), make()
    for number, module in enumerate((plain, to_lightning(brain))):
        trainer = trainer_with(
            LearningRateMonitor("step"), logger=CSVLogger(tmp_path, "", str(number)),
            log_every_n_steps=2, num_sanity_val_steps=0, **arguments,
        )  # fmt: skip
        trainer.fit(module, loader(4 * batches), loader())
        found.append((axis(trainer), trainer.global_step))
    (expected, steps), (rows, my_steps) = found
    assert my_steps == steps == (10 if batches == 5 else 8)
    for name in ("train_loss_step", "lr"):
        assert rows[name] == expected[name]
    # The average is SpeechBrain's; where it stands is Lightning's.
    assert [step for step, _ in rows["valid_loss"]] == [s for s, _ in expected["valid_loss"]]
    assert {step for step, _ in rows["epoch"]} >= {s for s, _ in rows["train_loss_step"]}
    assert same_weights(plain, brain)


@pytest.mark.parametrize("brain_class", [Regression, ByHand])
def test_the_axis_counts_on_after_a_kill(brain_class: type[Brain], tmp_path: Path) -> None:
    """Wherever a save was: in the middle of a window, at its end, with a validation due."""

    class Killing(Callback):
        def __init__(self, batch: int) -> None:
            self.batch = batch

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            self.batch -= 1
            if not self.batch:
                trainer.save_checkpoint(tmp_path / "kill.ckpt")
                raise ConnectionError

    def fit(name: str, *callbacks: Callback, ckpt_path: Any = None) -> dict[str, Any]:
        logger = CSVLogger(tmp_path, "", name)
        trainer = trainer_with(*callbacks, logger=logger, log_every_n_steps=1)
        brain = make(brain_class, grad_accumulation_factor=2)
        module = to_lightning(brain, epoch_counter=range(1, 3))
        trainer.fit(module, loader(24), loader(), ckpt_path=ckpt_path)
        return axis(trainer)

    whole = fit("whole")
    assert [step for step, _ in whole["train_loss_step"]] == list(range(6))
    for batch in (3, 4, 6):
        with pytest.raises(ConnectionError):
            fit(f"killed {batch}", Killing(batch))
        resumed = fit(f"resumed {batch}", ckpt_path=tmp_path / "kill.ckpt")
        for name in ("train_loss_step", "valid_loss"):
            assert resumed[name] == whole[name][-len(resumed[name]) :]
        assert len(resumed["valid_loss"]) == 2


class Counting(Regression):
    epochs: tuple[Any, ...] = ()

    def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
        self.epochs += (epoch,) if stage.name == "TRAIN" else ()


class PlainCounting(PlainRegression):
    epochs: tuple[Any, ...] = ()

    def on_train_epoch_start(self) -> None:
        self.epochs += (self.current_epoch + 1,)


def more_epochs(trainer: Trainer) -> None:
    trainer.fit_loop.max_epochs = 4


def more_steps(trainer: Trainer) -> None:
    trainer.fit_loop.epoch_loop.max_steps = 12


@pytest.mark.parametrize(
    ("change", "arguments"),
    [
        (more_epochs, {}), (more_steps, {"max_steps": 7, "max_epochs": -1}),
        (lambda trainer: None, {}),
    ],
    ids=["more epochs", "more steps", "unchanged"],
)  # fmt: skip
@pytest.mark.parametrize("another", [False, True], ids=["same module", "another"])
def test_a_second_fit_counts_on(
    change: Callable[[Trainer], None], arguments: Any, another: bool, tmp_path: Path
) -> None:
    plain, brain, found = PlainCounting(), make(Counting), []
    for name, model, again in (
        ("plain", plain, lambda: plain), ("brain", brain, lambda: to_lightning(brain)),
    ):  # fmt: skip
        trainer = trainer_with(
            logger=CSVLogger(tmp_path, "", name), log_every_n_steps=1,
            num_sanity_val_steps=0, **arguments,
        )  # fmt: skip
        module: LightningModule = again()
        trainer.fit(module, loader(), loader())
        change(trainer)
        trainer.fit(again() if another else module, loader(), loader())
        counts = trainer.current_epoch, trainer.global_step
        found.append((model.epochs, counts, axis(trainer)["train_loss_step"]))
    assert found[0] == found[1]
    assert same_weights(plain, brain)


def test_what_a_second_fit_saves_resumes_with_its_epochs(tmp_path: Path) -> None:
    """In a new process, and on a Trainer that has counted already."""
    first, path = make(Counting), tmp_path / "second.ckpt"
    trainer = trainer_with()
    trainer.fit(to_lightning(first), loader())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(to_lightning(first), loader())
    trainer.save_checkpoint(path)
    used = trainer_with(max_epochs=1)
    used.fit(to_lightning(make()), loader())
    used.fit_loop.max_epochs = 6
    for resuming in (trainer_with(max_epochs=6), used):
        brain = make(Counting)
        resuming.fit(to_lightning(brain), loader(), ckpt_path=path)
        assert brain.epochs == (5, 6)
        assert resuming.current_epoch == 6
        assert resuming.global_step == 30


def test_a_counter_that_was_given_counts() -> None:
    for counter, epochs in ((range(1, 3), (1, 2, 1, 2)), (EpochCounter(3), (1, 2, 3))):
        brain = make(Counting)
        for _ in range(2):
            module = to_lightning(brain, epoch_counter=counter)
            trainer_with(max_epochs=-1).fit(module, loader())
        assert brain.epochs == epochs
