"""``--plot`` and ``CurvePlot``: a plot after each epoch, which a resumed run continues."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from matplotlib.figure import Figure

from brain_lightning import (
    CurvePlot,
    LightningTrainLogger,
    RunOptionError,
    UnsupportedError,
    to_lightning,
)
from brain_lightning.cli.main import main
from brain_lightning.loggers.curves import draw, read_curves, write_curves
from tests.support.brains import Regression, loader, make, trainer_with
from tests.support.processes import check_python
from tests.support.reporting import Killed, Stub, reporting, train_and_test
from tests.support.scripts import QUIET, TOY, script

# Warnings of SpeechBrain, and tips of Lightning.
pytestmark = pytest.mark.filterwarnings("ignore")


def plotted(brain: Any, plot: CurvePlot) -> Any:
    brain._lightning.trainer_arguments = {"callbacks": [plot]}
    return brain


@pytest.fixture
def blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes plots with metrics but without curves, because drawing is slow."""
    monkeypatch.setattr("brain_lightning.loggers.curves.draw", lambda *_: Figure((1, 1)))


def lines_in(figure: Figure) -> dict[str, dict[str, list[float]]]:
    """Returns the values of each line by panel and label."""
    return {
        axes.get_title(): {
            str(line.get_label()).split(":")[0]: list(line.get_ydata()) for line in axes.lines
        }
        for axes in figure.axes
    }


# ------------------------------------------------------------------------ contents of the plot


def test_a_panel_for_the_losses_one_for_each_metric_and_the_learning_rates() -> None:
    history = {
        float(epoch): {
            "train_loss": 3.0 / epoch, "valid_loss": 2.0 / epoch, "loss": 2.0 / epoch,
            "valid_WER": 0.5, "WER": 0.5, "lr_g": 0.1, "lr_d": 0.2, "Epoch": epoch,
            "speed": 7.0,
        }
        for epoch in (1, 2)
    }  # fmt: skip
    tests = [{"test_loss": 0.4}, {"test_loss": 0.3, "test_PER": 9.0}]
    panels = lines_in(draw(history, tests))
    assert [*panels] == ["loss", "WER", "speed", "PER", "learning rate"]
    assert panels["loss"]["train"] == [3.0, 1.5]
    assert panels["loss"]["valid"] == [2.0, 1.0]
    assert panels["PER"]["test"] == [9.0, 9.0]
    assert panels["learning rate"] == {"lr_g": [0.1, 0.1], "lr_d": [0.2, 0.2]}
    assert [*panels["speed"].values()] == [[7.0, 7.0]]


def test_scales_are_logarithmic_where_numbers_span_much() -> None:
    history = {1.0: {"a": 1.0, "b": 1.0, "c": -1.0}, 2.0: {"a": 1e-3, "b": 0.5, "c": 1e3}}
    scales = {axes.get_title(): axes.get_yscale() for axes in draw(history, []).axes}
    assert scales == {"a": "log", "b": "linear", "c": "linear"}


def test_a_plot_stores_its_metrics_and_is_written_atomically(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = {1.0: {"loss": float("nan")}, 2.0: {"loss": 1 / 3}}
    path = tmp_path / "curves.png"
    write_curves(path, history, [])
    assert repr(read_curves(path)) == repr(history)

    def half(self: Figure, to: Path, **kwargs: Any) -> None:
        Path(to).write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="the disk is full"):
        write_curves(path, {}, [])
    assert len(read_curves(path)) == 2


def test_other_files_have_no_metrics(tmp_path: Path) -> None:
    assert read_curves(tmp_path / "missing.png") == {}
    (tmp_path / "text.png").write_text("no picture")
    assert read_curves(tmp_path / "text.png") == {}
    Figure().savefig(tmp_path / "other.png")
    assert read_curves(tmp_path / "other.png") == {}


# --------------------------------------------------------------------- path and time


def test_curves_of_the_metrics_of_a_recipe(tmp_path: Path) -> None:
    brain = plotted(
        reporting(LightningTrainLogger(Stub()), output_folder=tmp_path / "results"),
        CurvePlot(),
    )
    train_and_test(brain)
    history = read_curves(tmp_path / "results" / "curves.png")
    assert [*history] == [1, 2, 3, 4]
    assert [numbers["valid_WER"] for numbers in history.values()] == [29, 28, 27, 26]
    assert all({"train_loss", "valid_loss", "lr"} <= n.keys() for n in history.values())


def test_tests_are_drawn_until_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(
        "brain_lightning.loggers.curve_plot.write_curves",
        lambda path, history, tests: drawn.append(([*history], [*tests])),
    )
    brain = plotted(make(hparams={"output_folder": tmp_path}), CurvePlot())
    brain.fit(range(1, 2), loader(), loader())
    loss = brain.evaluate(loader(8))
    brain.evaluate(loader(12))
    assert [epochs for epochs, _ in drawn] == [[1]] * len(drawn)
    assert drawn[-2][1] == [{"test_loss": pytest.approx(loss)}]
    assert len(drawn[-1][1]) == 2
    brain.fit(range(2, 3), loader(), loader())
    assert drawn[-1] == ([1, 2], [])


def test_learning_rates_that_a_recipe_does_not_report(tmp_path: Path) -> None:
    class Annealing(Regression):
        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            if stage.name == "VALID":
                self.optimizer.param_groups[0]["lr"] /= 2

    brain = plotted(make(Annealing), CurvePlot(tmp_path / "curves.png"))
    brain.fit(range(1, 4), loader(), loader())
    rates = [numbers["lr"] for numbers in read_curves(tmp_path / "curves.png").values()]
    assert rates == [0.1, 0.05, 0.025]


def test_curves_without_a_validation(tmp_path: Path) -> None:
    plot = CurvePlot(tmp_path / "curves.png")
    trainer = trainer_with(plot, max_epochs=2)
    trainer.fit(to_lightning(make()), loader())
    history = read_curves(tmp_path / "curves.png")
    assert [sorted(numbers) for numbers in history.values()] == [
        ["loss", "lr", "train_loss"]
    ] * 2


def test_a_resumed_run_has_the_curves_of_an_uninterrupted_run(
    tmp_path: Path, blank: None
) -> None:
    def run(name: str, killed_in: int = 0) -> dict[float, dict[str, float]]:
        path = tmp_path / f"{name}.png"
        brain = reporting(LightningTrainLogger(Stub()), tmp_path / name, killed_in=killed_in)
        try:
            train_and_test(plotted(brain, CurvePlot(path)))
        except Killed:
            assert killed_in
        return read_curves(path)

    whole = run("whole")
    # First the epoch of the kill was not drawn. Then the file has epochs after the checkpoint.
    assert [*run("killed", killed_in=2)] == [1]
    path = tmp_path / "killed.png"
    write_curves(path, {1: whole[1], 2: {"loss": 99.0}, 3: {"loss": 99.0}}, [])
    assert run("killed") == whole
    # A run that restarts without a checkpoint has new curves.
    for each in (tmp_path / "killed").glob("CKPT*"):
        each.rename(tmp_path / each.name)
    assert [*run("killed", killed_in=3)] == [1, 2]


def test_each_brain_has_a_separate_plot(tmp_path: Path, blank: None) -> None:
    plot = CurvePlot(tmp_path / "mine.png")
    for epochs in (1, 2, 3):
        plotted(make(), plot).fit(range(1, 1 + epochs), loader(), loader())
    found = {path.name: len(read_curves(path)) for path in tmp_path.glob("*.png")}
    assert found == {"mine.png": 1, "mine-2.png": 2, "mine-3.png": 3}


def test_validations_in_the_middle_of_an_epoch_are_one_point(
    tmp_path: Path, blank: None
) -> None:
    plot = CurvePlot(tmp_path / "curves.png")
    trainer = trainer_with(plot, max_epochs=2, val_check_interval=2)
    trainer.fit(to_lightning(make()), loader(), loader(8))
    assert [*read_curves(tmp_path / "curves.png")] == [1, 2]


class Recording(Callback):
    def __init__(self) -> None:
        self.calls: list[tuple[Any, set[str]]] = []

    def on_brain_metrics(
        self, trainer: Any, pl_module: Any, epoch: Any, metrics: Mapping[str, float]
    ) -> None:
        self.calls.append((epoch, {*metrics}))


def test_any_callback_may_implement_on_brain_metrics() -> None:
    callback, brain = Recording(), make()
    brain._lightning.trainer_arguments = {"callbacks": [callback]}
    brain.fit(range(7, 8), loader(), loader())
    brain.evaluate(loader())
    shown = [(epoch, names) for epoch, names in callback.calls if names]
    assert shown == [(7, {"train_loss", "valid_loss", "loss"}), (None, {"test_loss"})]


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("path", ["curves.pdf", "curves", "results/"])
def test_a_path_that_is_not_a_png_raises(path: str) -> None:
    with pytest.raises(RunOptionError, match=r"must end in \.png"):
        CurvePlot(path)


def test_without_matplotlib_nothing_is_trained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(UnsupportedError, match="pip install matplotlib"):
        CurvePlot()
    assert main(["run", *TOY, *QUIET, "--plot"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


# ---------------------------------------------------------------------- command line


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_an_unedited_recipe_is_plotted_wherever_the_option_stands(
    tmp_path: Path, position: int
) -> None:
    words = [*TOY, *QUIET, f"--output_folder={tmp_path}"]
    words.insert(position, "--plot")
    assert main(["run", *words]) == 0
    assert len(read_curves(tmp_path / "curves.png")) == 3


def test_where_to_plot_is_chosen_and_a_recipe_keeps_its_callbacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = tmp_path / "toy.yaml"
    yaml.write_text(
        Path(TOY[1]).read_text()
        + "trainer:\n    callbacks: [!new:lightning.pytorch.callbacks.EarlyStopping\n"
        "        {monitor: valid_loss, stopping_threshold: 1000.0}]\n"
    )
    words = [TOY[0], str(yaml), *QUIET, f"--output_folder={tmp_path}"]
    assert main(["run", *words, f"--plot={tmp_path}/a/b.png"]) == 0
    # A callback of the recipe has stopped the run.
    assert len(read_curves(tmp_path / "a" / "b.png")) == 1


def test_two_processes_plot_once(tmp_path: Path) -> None:
    words = [*TOY, *QUIET, f"--output_folder={tmp_path}", "--trainer.devices=2", "--plot"]
    check_python("-m", "brain_lightning", "run", *words, cwd=tmp_path)
    assert [path.name for path in tmp_path.glob("*.png*")] == ["curves.png"]
    assert len(read_curves(tmp_path / "curves.png")) == 3


FIT_WITHIN_FIT = """
import torch
from brain_lightning import Brain

class Nested(Brain):
    def compute_forward(self, batch, stage):
        return self.modules.model(batch)

    def compute_objectives(self, predictions, batch, stage):
        return predictions.square().mean()

    def on_stage_start(self, stage, epoch=None):
        if epoch == 2 and stage.name == "TRAIN":
            self.fit(range(5, 7), DATA, progressbar=False)

DATA = [torch.ones(2, 3)] * 3
brain = Nested({"model": torch.nn.Linear(3, 1)}, lambda p: torch.optim.SGD(p, 0.1),
               {"output_folder": FOLDER}, {"device": "cpu"})
brain.fit(range(1, 4), DATA, DATA, progressbar=False)
"""


def test_a_fit_within_a_fit_is_not_plotted(tmp_path: Path, blank: None) -> None:
    text = FIT_WITHIN_FIT.replace("FOLDER", repr(str(tmp_path)))
    assert main(["run", script(tmp_path, text), "--plot"]) == 0
    assert [*read_curves(tmp_path / "curves.png")] == [1, 2, 3]


def test_callbacks_of_every_trainer_are_added_to_those_of_the_recipe(
    tmp_path: Path, blank: None
) -> None:
    own, beside = CurvePlot(tmp_path / "own.png"), CurvePlot(tmp_path / "beside.png")
    brain = make()
    brain._lightning.trainer_callbacks = (beside,)
    trainer = trainer_with(own)
    trainer.fit(to_lightning(brain), loader(), loader())
    assert {path.name for path in tmp_path.glob("*.png")} == {"own.png", "beside.png"}
    assert trainer.callbacks == [own]


def test_a_plot_that_cannot_be_written_does_not_end_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("brain_lightning.loggers.curve_plot.write_curves", full)
    brain = make()
    trainer_with(CurvePlot(tmp_path / "c.png")).fit(to_lightning(brain), loader(), loader())
    assert brain.optimizer_step == 10
    assert "could not write the plot: no space left" in caplog.text


@pytest.mark.parametrize("epochs", [torch.arange(1, 3), [("a", 1), ("a", 2)]], ids=str)
def test_epochs_of_any_kind_are_drawn(tmp_path: Path, epochs: Any) -> None:
    module = to_lightning(make(), epoch_counter=epochs)
    trainer_with(CurvePlot(tmp_path / "c.png")).fit(module, loader(), loader())
    assert list(read_curves(tmp_path / "c.png")) == [1, 2]


def test_a_damaged_plot_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "c.png"
    write_curves(path, {1: {"train_loss": 1.0}}, [])
    whole = path.read_bytes()
    for damaged in (
        whole[:100],
        whole[: len(whole) // 2],
        b"",
        whole.replace(b"[[", b"[1", 1),
    ):
        path.write_bytes(damaged)
        assert read_curves(path) in ({}, {1: {"train_loss": 1.0}})
