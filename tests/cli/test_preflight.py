"""``brain-lightning preflight``: every set of a script is tried, and nothing is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from brain_lightning.cli.main import main
from tests.support.processes import run_python
from tests.support.scripts import QUIET, TOY, script

# SpeechBrain raises warnings.
pytestmark = pytest.mark.filterwarnings("ignore")

RECIPE = """
import sys
import torch
import brain_lightning as bl

WORDS = sys.argv[1:]


class Recipe(bl.Brain):
    def compute_forward(self, batch, stage):
        if "statistics" in WORDS and stage.name == "TEST":
            raise RuntimeError("there are no statistics of the training set")
        if stage.name in WORDS:
            raise MemoryError(f"no room in {stage.name}")
        return self.modules.model(batch)

    def compute_objectives(self, predictions, batch, stage):
        return predictions.square().mean()

    def on_evaluate_start(self, max_key=None, min_key=None):
        if "averages" in WORDS:
            raise ValueError("there are no checkpoints to average")

    def on_stage_end(self, stage, stage_loss, epoch=None):
        raise AssertionError("a stage has run")


if WORDS != ["nothing"]:
    model = torch.nn.Linear(4, 2)
    before = model.weight.clone()
    options = {"device": "cpu", "noprogressbar": True}
    brain = Recipe({"model": model}, torch.optim.SGD, {}, options)
    data = [torch.randn(4) for _ in range(8)]
    loader = {"batch_size": 2}
    for _ in range(2):
        brain.fit(range(3), data, data, train_loader_kwargs=loader)
    if "results" in WORDS:
        open("results.txt")
    brain.evaluate(data, test_loader_kwargs=loader)
    assert torch.equal(before, model.weight)
    print("done")
"""


def preflight(folder: Path, *words: str) -> int:
    return main(["preflight", script(folder, RECIPE), *words])


def test_each_fit_and_each_evaluation_is_tried_and_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # There are no checkpoints.
    assert preflight(tmp_path, "averages") == 0
    lines = capsys.readouterr().out.splitlines()
    tried = [line.split()[:3] for line in lines if line[:5] in ("TRAIN", "VALID", "TEST ")]
    fit = [["TRAIN", "size", "2"], ["VALID", "size", "1"]]
    assert tried == [*fit, *fit, ["TEST", "size", "2"]]
    assert lines[-1] == "done"


@pytest.mark.parametrize("stage", ["TRAIN", "VALID", "TEST"])
def test_a_batch_without_memory_ends_it_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    assert preflight(tmp_path, stage) == 2
    out, err = capsys.readouterr()
    assert (
        f"error: preflight: out of memory with the longest batch in {stage}, with ids [" in err
    )
    assert f"a tensor ({1 + (stage != 'VALID')}, 4): no room in {stage}. Make" in err
    assert "done" not in out


def test_what_a_script_does_with_a_trained_model_is_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert preflight(tmp_path, "statistics") == 0
    assert "ended with RuntimeError: there are no statistics of the training" in caplog.text
    assert preflight(tmp_path, "results") == 0
    assert "the script ended with FileNotFoundError: [Errno 2] No such file" in caplog.text
    assert preflight(tmp_path, "nothing") == 2
    assert "nothing was tried: " in capsys.readouterr().err


@pytest.mark.parametrize(("word", "status"), [("statistics", 0), ("TEST", 2)])
def test_ranks_show_a_traceback_only_of_an_error_that_ends_the_command(
    tmp_path: Path, word: str, status: int
) -> None:
    command = ("-m", "brain_lightning", "preflight", script(tmp_path, RECIPE), word)
    done = run_python(*command, "--trainer.devices=2", cwd=tmp_path)
    assert done.returncode == status, done.stderr
    warns = "ended with RuntimeError: there are no statistics of the training" in done.stderr
    assert warns == (status == 0)
    for shown in ("failed, which also ends the other ranks", "Traceback"):
        assert (shown in done.stderr) == (status != 0)


def test_a_recipe_on_speechbrains_brain_is_tried(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["preflight", *TOY, *QUIET]) == 0
    # The recipe writes to a temporary output_folder.
    assert not list(Path.cwd().iterdir())
    tried = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "GiB" in line]
    assert tried == ["TRAIN", "VALID", "TEST"]
