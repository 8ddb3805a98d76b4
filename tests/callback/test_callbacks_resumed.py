"""Every callback that Lightning ships does the same with a kill and a resume as without.

``python -m pytest tests/callback/test_callbacks_resumed.py -v`` prints the matrix.
``test_lightning_callbacks.py`` asserts what the effects are.
"""

from __future__ import annotations

import inspect
import pkgutil
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as callbacks
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor
from torch.optim.swa_utils import SWALR

from brain_lightning import to_lightning
from brain_lightning.cli.convert import from_lightning
from brain_lightning.compat.versions import LIGHTNING
from tests.support.brains import loader, trainer_with
from tests.support.killed import (
    EPOCHS,
    KILLED_IN,
    WAYS,
    Case,
    Ended,
    Recipe,
    Runs,
    assert_resumed,
    load,
)

# Lightning's advice about workers, loggers and the like, as any user of it sees.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

# Base classes, which do nothing by themselves.
BASES = {"Callback", "Checkpoint", "ProgressBar"}


class HeadFirst(Recipe):
    """Leaves the backbone to a callback."""

    trained = ("head",)


class Unfreezes(callbacks.BaseFinetuning):
    """A user's own: the backbone joins in the second epoch."""

    def freeze_before_training(self, module: Any) -> None:
        self.freeze(module.backbone)

    def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.backbone, optimizer, lr=0.03)


class Spiking(Recipe):
    """A loss that is far too large in the middle of the last epoch."""

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        loss = super().compute_objectives(predictions, batch, stage)
        return loss + 100 if self.moment == (EPOCHS, 3) else loss


class Planned(Recipe):
    """Validation losses that get no better."""

    def evaluate_batch(self, batch: Any, stage: Any) -> Tensor:
        return torch.tensor(float(self.hparams.epoch_counter.current))


class Writer(callbacks.BasePredictionWriter):
    """Writes what ``compute_forward`` returns."""

    def __init__(self, folder: Path) -> None:
        super().__init__("epoch")
        self.folder = folder

    def write_on_epoch_end(self, *args: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(args[2], self.folder / "predictions.pt")


def predicted(ended: Ended) -> list[Tensor]:
    trainer_with(*ended.callbacks).predict(to_lightning(ended.brain), loader())
    predictions: list[Tensor] = torch.load(ended.folder / "files" / "predictions.pt")
    return predictions


def hears(folder: Path) -> callbacks.LambdaCallback:
    """Writes the epochs and the batches that it hears of."""
    folder.mkdir(parents=True, exist_ok=True)

    def hear(trainer: Any, *args: Any) -> None:
        with (folder / "heard").open("a") as file:
            file.write(f"{trainer.current_epoch} {args[-1] if len(args) > 1 else ''}\n")

    return callbacks.LambdaCallback(on_train_epoch_end=hear, on_train_batch_end=hear)


def heard(ended: Ended) -> set[str]:
    # A batch that was fitted again is heard of again.
    return {*(ended.folder / "files" / "heard").read_text().splitlines()}


def rates(ended: Ended) -> list[dict[str, Any]]:
    groups = ended.brain.optimizer.param_groups
    return [{"lr": group["lr"], "parameters": len(group["params"])} for group in groups]


def zeros(ended: Ended) -> list[int]:
    return [int((p == 0).sum()) for p in ended.brain.modules.state_dict().values()]


def shown(*texts: str) -> Any:
    return lambda ended: [text in ended.shown for text in texts]


def state(ended: Ended) -> dict[str, Any]:
    return {
        name: str(value).replace(str(ended.folder), "")
        for name, value in ended.first.state_dict().items()
    }


def saved(ended: Ended) -> tuple[Any, ...]:
    return state(ended), ended.files()


def saves(**kwargs: Any) -> Case:
    """A ModelCheckpoint: its files, the weights in them, and what it knows of them."""
    return Case(lambda folder: [callbacks.ModelCheckpoint(folder, **kwargs)], saved)


def prunes(**kwargs: Any) -> Case:
    pruning = partial(callbacks.ModelPruning, "l1_unstructured", amount=0.3, **kwargs)
    return Case(lambda _: [pruning()], zeros)


# Older versions of torch put a function into the state of SWALR: such a state is not written
# to checkpoint directories, and a warning says so.
SWALR_STATE = SWALR(torch.optim.SGD([torch.zeros(1)], 0.1), 0.1).state_dict()
AVERAGED_WAYS = ("file",) if callable(SWALR_STATE.get("anneal_func")) else WAYS


def averages(*args: Any, norm: bool = False, **kwargs: Any) -> Case:
    averaging = partial(callbacks.StochasticWeightAveraging, *args, **kwargs)
    return Case(
        lambda _: [averaging()], lambda ended: ended.first.state_dict(), norm=norm,
        ways=AVERAGED_WAYS,
    )  # fmt: skip


ROWS = {
    "EarlyStopping": Case(
        lambda _: [callbacks.EarlyStopping("valid_loss", patience=2)],
        lambda ended: (ended.first.stopped_epoch, state(ended)),
        Planned,
        arguments=lambda: {"max_epochs": 9},
    ),
    "ModelCheckpoint": saves(),
    "ModelCheckpoint(monitor)": saves(monitor="valid_loss", save_top_k=2, save_last=True),
    "ModelCheckpoint(save_last='link')": saves(save_last="link", filename="{epoch}"),
    "ModelCheckpoint(every_n_train_steps)": saves(every_n_train_steps=3, save_top_k=-1),
    "ModelCheckpoint(every_n_train_steps, monitor)": saves(
        every_n_train_steps=3, monitor="valid_loss", save_top_k=2
    ),
    "ModelCheckpoint(every_n_epochs)": saves(every_n_epochs=2, save_top_k=-1),
    "ModelCheckpoint(train_time_interval)": saves(
        train_time_interval=timedelta(0), enable_version_counter=False
    ),
    "ModelCheckpoint(save_on_train_epoch_end)": saves(
        monitor="train_loss", save_on_train_epoch_end=True, save_top_k=2
    ),
    "ModelCheckpoint(save_weights_only)": saves(save_weights_only=True),
    "ModelCheckpoint(AsyncCheckpointIO)": Case(
        lambda folder: [callbacks.ModelCheckpoint(folder, save_top_k=-1)],
        saved,
        arguments=lambda: {"plugins": AsyncCheckpointIO()},
    ),
    "LearningRateMonitor(epoch)": Case(
        lambda _: [callbacks.LearningRateMonitor("epoch")], Ended.rows, logs=True
    ),
    "LearningRateMonitor(step)": Case(
        lambda _: [callbacks.LearningRateMonitor("step")], Ended.rows, logs=True
    ),
    "StochasticWeightAveraging": averages(0.05, swa_epoch_start=2),
    "StochasticWeightAveraging(BatchNorm)": averages(0.05, swa_epoch_start=1, norm=True),
    "GradientAccumulationScheduler": Case(
        lambda _: [callbacks.GradientAccumulationScheduler({0: 2, 1: 3, 2: 1})],
        lambda ended: ended.brain.optimizer_step,
    ),
    "BackboneFinetuning": Case(
        lambda _: [callbacks.BackboneFinetuning(1, backbone_initial_lr=0.01)],
        lambda ended: (rates(ended), state(ended)),
        HeadFirst,
    ),
    "BaseFinetuning": Case(lambda _: [Unfreezes()], rates, HeadFirst),
    "ModelPruning": prunes(),
    "ModelPruning(not permanent)": prunes(make_pruning_permanent=False),
    "ModelPruning(no lottery)": prunes(use_lottery_ticket_hypothesis=False),
    "ModelPruning(late lottery)": prunes(
        apply_pruning=lambda epoch: epoch > 1, prune_on_train_epoch_end=False
    ),
    "TQDMProgressBar": Case(
        lambda _: [callbacks.TQDMProgressBar()],
        shown(f"Epoch {EPOCHS}/{EPOCHS}: 100%", "5/5", "train_loss=", "valid_loss="),
        arguments=lambda: {"enable_progress_bar": True},
    ),
    "RichProgressBar": Case(
        lambda _: [callbacks.RichProgressBar()],
        shown(f"Epoch {EPOCHS}/{EPOCHS}", "5/5"),
        arguments=lambda: {"enable_progress_bar": True},
    ),
    "ModelSummary": Case(lambda _: [callbacks.ModelSummary(2)], shown("brain_modules", "44 ")),
    "RichModelSummary": Case(lambda _: [callbacks.RichModelSummary(2)], shown("44 ")),
    "DeviceStatsMonitor": Case(
        lambda _: [callbacks.DeviceStatsMonitor(cpu_stats=True)], Ended.rows, logs=True
    ),
    "ThroughputMonitor": Case(
        lambda _: [callbacks.ThroughputMonitor(lambda batch: len(batch[0]), window_size=2)],
        # Its window begins anew with each process, as with a plain LightningModule.
        lambda ended: {row for row in ended.rows() if "_per_sec" not in row[0]},
        logs=True,
    ),
    "SpikeDetection": Case(
        lambda folder: [
            SpikeDetection(window=3, atol=50.0, exclude_batches_path=folder / "skip.json")
        ],
        lambda ended: (
            ended.error,
            ended.first.bad_batches,
            (ended.folder / "files" / "skip.json").read_text(),
            ended.first.running_mean.compute(),
        ),
        Spiking,
    ),
    "LambdaCallback": Case(lambda folder: [hears(folder)], heard),
    "BasePredictionWriter": Case(lambda folder: [Writer(folder)], predicted),
}  # fmt: skip

if LIGHTNING < "2.5.4":
    # It writes tensors while training changes them.
    del ROWS["ModelCheckpoint(AsyncCheckpointIO)"]
if LIGHTNING < "2.5.3":
    # It cannot show a Brain's bar.
    del ROWS["RichProgressBar"]


if LIGHTNING >= "2.6":
    EMA = partial(callbacks.EMAWeightAveraging, decay=0.9)
    ROWS |= {
        "WeightAveraging": Case(lambda _: [callbacks.WeightAveraging()], state),
        "EMAWeightAveraging": Case(lambda _: [EMA()], state, norm=True),
        "EMAWeightAveraging with others": Case(
            lambda folder: [
                callbacks.ModelCheckpoint(folder, monitor="valid_loss", save_top_k=2),
                callbacks.EarlyStopping("valid_loss", patience=2),
                callbacks.LearningRateMonitor("epoch"),
                EMA(),
            ],
            lambda ended: (saved(ended), ended.rows(), ended.trainer.current_epoch),
            logs=True,
        ),
    }


@pytest.mark.parametrize("name", ROWS)
def test_resumed_matrix(name: str, tmp_path: Path, capsys: Any, caplog: Any) -> None:
    caplog.set_level("INFO")
    case = ROWS[name]
    whole = Runs(case, "", capsys, caplog).run(tmp_path / "whole")
    for way in case.ways:
        runs = Runs(case, way, capsys, caplog)
        runs.run(tmp_path / way, KILLED_IN)
        assert_resumed(whole, runs.run(tmp_path / way), case.effect)


def test_a_run_is_resumed_from_what_an_exception_saved(
    tmp_path: Path, capsys: Any, caplog: Any
) -> None:
    """Again and again: OnExceptionCheckpoint, and ModelCheckpoint(save_on_exception)."""

    def savers(folder: Path) -> list[Callback]:
        return [callbacks.OnExceptionCheckpoint(folder, "saved")]

    runs = Runs(Case(savers, rates), "exception", capsys, caplog)
    whole = runs.run(tmp_path / "whole")
    runs.run(tmp_path / "killed", (1, 3))
    runs.run(tmp_path / "killed", KILLED_IN)
    assert_resumed(whole, runs.run(tmp_path / "killed"), rates)


@pytest.mark.parametrize(("way", "seconds"), [("file", 15), ("directory", 8)])
def test_a_timer_goes_on_from_a_file_and_counts_per_start_from_directories(
    tmp_path: Path, capsys: Any, caplog: Any, clock: Any, way: str, seconds: int
) -> None:
    class Slow(Recipe):
        def on_fit_batch_start(self, *_: Any) -> None:
            clock.now += 1

    runs = Runs(Case(lambda _: [callbacks.Timer()], rates, Slow), way, capsys, caplog)
    whole = runs.run(tmp_path / "whole")
    runs.run(tmp_path / "killed", KILLED_IN)
    resumed = runs.run(tmp_path / "killed")
    assert_resumed(whole, resumed, rates)
    elapsed = [run.first.time_elapsed() for run in (whole, resumed)]
    assert elapsed == [15, seconds]


def test_a_file_of_pruned_weights_becomes_a_directory(
    tmp_path: Path, capsys: Any, caplog: Any
) -> None:
    def pruning(folder: Path) -> list[Callback]:
        saver = callbacks.ModelCheckpoint(folder, "saved", every_n_train_steps=3)
        return [*ROWS["ModelPruning"].make(folder), saver]

    # With a Checkpointer, a file says which weights are in which of its recoverables.
    Runs(Case(pruning, zeros), "directory", capsys, caplog).run(tmp_path, (2, 5))
    (file,) = tmp_path.rglob("saved.ckpt")
    directory = from_lightning(file, tmp_path / "CKPT+converted")
    head = torch.load(directory / "head.ckpt")
    assert torch.equal(head["weight"], load(file)["state_dict"]["brain_modules.head.weight"])
    assert (head["weight"] == 0).any()


def test_every_callback_of_lightning_has_a_row() -> None:
    shipped = {
        name
        for module in pkgutil.walk_packages(callbacks.__path__, f"{callbacks.__name__}.")
        for name, each in inspect.getmembers(
            pkgutil.resolve_name(module.name), inspect.isclass
        )
        if issubclass(each, Callback) and each.__module__.startswith(callbacks.__name__)
    }
    assert set(callbacks.__all__) - BASES <= shipped
    own_tests = {"OnExceptionCheckpoint", "Timer", "LearningRateFinder", "BatchSizeFinder"}
    rows = {name.partition("(")[0] for name in ROWS}
    assert shipped - BASES - own_tests <= rows | {"RichProgressBar"}
