"""``brain-lightning run --report``: what a search of hyperparameters reads of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from brain_lightning.cli.main import main
from tests.support.scripts import script

# Each fit reports the next of these, epoch by epoch.
RECIPE = """
import os
import sys
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
import brain_lightning as bl

FOLDER, *WORDS = sys.argv[1:]
NAN = float("nan")


class Logger:
    def log_stats(self, stats_meta, train_stats=None, valid_stats=None, test_stats=None):
        pass


class Recipe(bl.Brain):
    def compute_forward(self, batch, stage):
        return self.modules.model(batch)

    def compute_objectives(self, predictions, batch, stage):
        return predictions.square().mean()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        if stage.name == "TRAIN":
            self.hparams.train_logger.log_stats({"lr": 0.1}, train_stats={"acc": 1.0})
            if epoch == 1 and "nested" in WORDS:
                make([0.0]).fit(range(1), DATA)
                self.nested = True
                self.fit(range(1), DATA, DATA)
                self.nested = False
            return
        if stage.name == "TEST":
            self.hparams.train_logger.log_stats({}, test_stats={"WER": 7.5, "CER": 3.5})
            return
        wer = -5.0 if getattr(self, "nested", False) else self.hparams.wers[epoch - 1]
        self.hparams.train_logger.log_stats({}, valid_stats={"WER": wer, "acc": wer / 10})
        if self.checkpointer is not None:
            self.checkpointer.save_and_keep_only(meta={"WER": wer})
        if f"killed{epoch}" in WORDS:
            raise RuntimeError("killed")


def make(wers, **more):
    hparams = {"wers": wers, "train_logger": Logger()}
    model = torch.nn.Linear(3, 1)
    return Recipe({"model": model}, lambda p: torch.optim.SGD(p, 0.1), hparams,
                  {"device": "cpu", "noprogressbar": True}, **more)


DATA = torch.utils.data.DataLoader(torch.ones(4, 3), 2)
"""
ONCE = """
make([9.0, 1.0]).fit(bl.EpochCounter(2), DATA, DATA)
brain = make([4.0, 2.0, NAN, -float("inf"), 3.0])
brain.fit(bl.EpochCounter(2), DATA, DATA)
counter = bl.EpochCounter(5)
counter.current = 2
brain.fit(counter, DATA, DATA)
brain.evaluate(DATA)
make([]).fit([1], DATA)
print("done")
sys.exit()
"""
RESUMED = """
counter = bl.EpochCounter(3)
checkpointer = bl.Checkpointer(FOLDER + "/save", {"counter": counter})
brain = make([3.0, 2.0, 5.0], checkpointer=checkpointer)
brain.fit(counter, DATA, DATA)
"""
IN_A_FILE = """
trainer = Trainer(
    max_epochs=-1, accelerator="cpu", logger=False, enable_progress_bar=False,
    enable_model_summary=False, callbacks=[ModelCheckpoint(FOLDER, save_last=True)],
)
module = bl.to_lightning(make([3.0, 2.0, 5.0]), epoch_counter=bl.EpochCounter(3))
found = os.path.exists(FOLDER + "/last.ckpt")
trainer.fit(module, DATA, DATA, ckpt_path="last" if found else None)
"""

Run = Callable[..., tuple[int, str, Any]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a recipe: its status, the last line of what it prints, the file that it writes."""

    def run_it(text: str, *words: str, report: str | None = None) -> tuple[int, str, Any]:
        recipe = script(tmp_path, RECIPE + text)
        file = tmp_path / "made" / "report.json"
        asked = [] if report is None else [f"--report={report}", f"--report-file={file}"]
        status = main(["run", recipe, str(tmp_path), *words, *asked])
        out, err = capsys.readouterr()
        last = (out if status == 0 else err).splitlines()
        written = json.loads(file.read_text()) if file.is_file() else None
        return status, last[-1] if last else "", written

    return run_it


@pytest.mark.parametrize(
    ("report", "name", "value", "epoch"),
    [
        ("WER", "valid_WER", 2.0, 2), ("WER:max", "valid_WER", 4.0, 1),
        # TRAIN's is larger.
        ("acc:max", "valid_acc", 0.4, 1), ("train_acc:max", "train_acc", 1.0, 1),
        ("lr", "lr", 0.1, 1), ("CER", "test_CER", 3.5, None),
        ("test_WER", "test_WER", 7.5, None),
    ],
)  # fmt: skip
def test_the_best_of_all_epochs_is_the_last_line_and_in_a_file(
    run: Run, report: str, name: str, value: float, epoch: int | None
) -> None:
    """Of several fits of a Brain, and not of the Brain before it."""
    status, line, written = run(ONCE, report=report)
    assert (status, line) == (0, str(value))
    assert written.pop("last") == {"valid_WER": 3.0, "valid_acc": 0.3}.get(name, value)
    mode = report.partition(":")[2] or "min"
    assert written == {"name": name, "value": value, "mode": mode, "epoch": epoch}


def test_a_fit_within_a_fit_is_none_of_the_recipes_numbers(run: Run) -> None:
    nested = "make([3.0, 4.0]).fit(bl.EpochCounter(2), DATA, DATA)\nprint('no number')\n"
    assert run(nested, "nested", report="WER")[:2] == (0, "3.0")
    # The recipe's output is as it was.
    assert run(nested)[:2] == (0, "no number")


# Of the Trainer, which is none of ours.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("text", [RESUMED, IN_A_FILE])
def test_the_best_is_that_of_the_epochs_before_a_resume_too(
    run: Run, tmp_path: Path, text: str
) -> None:
    """Where the first process reported nothing, and where there is no epoch left to run."""
    with pytest.raises(RuntimeError, match="killed"):
        run(text, "killed2")
    assert run(text, report="WER")[1] == "2.0"
    status, line, written = run(text, report="WER")
    assert (status, line) == (0, "2.0")
    assert (written["epoch"], written["last"]) == (2, 5.0)
    assert run(text, report="WER:max")[1] == "5.0"


@pytest.mark.parametrize(
    ("text", "words", "says"),
    [
        (
            ONCE,
            ["--report=WRE"],
            "metric with this name. Reported metrics: lr, train_loss, tr",
        ),
        ("", ["--report=WER"], "metric with this name. Reported metrics: none."),
        ("make([NAN]).fit([1], DATA, DATA)", ["--report=WER"], "valid_WER was never finite"),
        (
            "1 / 0",
            ["--report=WER:best"],
            "--report=WER:best is not valid. Use the name of a metric",
        ),
        ("1 / 0", ["--report-file=x.json"], "--report-file needs --report"),
        ("1 / 0", ["--report=WER", "--report-file=/"], "--report-file=/ is a folder"),
        (
            "1 / 0",
            ["--report=WER", "--report-file=/dev/null/x"],
            "/dev/null/x: its folder cannot be created (File exists)",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Objective:UserWarning")
def test_a_number_that_cannot_be_reported_is_a_mistake(
    run: Run, text: str, words: list[str], says: str
) -> None:
    status, line, _ = run(text, *words)
    assert status == 2
    assert says in line


def test_a_wrong_name_is_warned_of_before_training(run: Run) -> None:
    with pytest.warns(UserWarning, match=r"Objective\(monitor='WRE'\): nothing in the code"):
        run("make([1.0]).fit([1], DATA, DATA)", report="WRE")


def test_an_exit_of_the_recipes_own_stays(run: Run) -> None:
    with pytest.raises(SystemExit, match="3"):
        run("make([1.0]).fit([1], DATA, DATA)\nsys.exit(3)", report="WER")


def test_orion_finds_what_it_minimizes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "orion.json"
    monkeypatch.setenv("ORION_RESULTS_PATH", str(file))
    for report, value in (("WER", 2.0), ("WER:max", -4.0)):
        assert run(ONCE, report=report)[0] == 0
        (found,) = json.loads(file.read_text())
        assert found == {"name": "valid_WER", "type": "objective", "value": value}
