"""``brain-lightning verify``: runs both loops, and finds their first difference."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from brain_lightning.cli.main import main
from brain_lightning.verify.comparison import Comparison
from brain_lightning.verify.evidence import Evidence
from tests.support.processes import python, variables
from tests.support.scripts import QUIET, TOY, script

# SpeechBrain raises warnings.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def in_real_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", variables()["PYTHONPATH"])


@pytest.fixture
def in_forks(in_real_processes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", python())


def verify(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    status = main(["verify", *words, *QUIET, "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("in_real_processes")
def test_a_recipe_is_verified(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["verify", *TOY, *QUIET, "--steps=8"])
    shown = capsys.readouterr().out
    assert status == 0, shown
    assert "EQUAL: all events are bitwise identical on both sides." in shown
    # Six batches per epoch, so two batches of the second epoch.
    assert shown.count("\n1      ") == 6
    assert shown.count("\n2      ") == 2
    for stage in ("TRAIN  1", "VALID  1", "TRAIN  2", "VALID  2", "TEST   -"):
        assert stage in shown


@pytest.mark.usefixtures("in_forks")
def test_a_dropout_that_is_reseeded_once_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = Path(TOY[0]).read_text().replace(
        "        return self.modules.model(batch[0])",
        "        from speechbrain.core import Brain\n"
        "        if Brain.fit.__module__.startswith('brain_lightning') and self.step == 4:\n"
        "            torch.manual_seed(0)\n"
        "        return self.modules.model(batch[0])",
    )  # fmt: skip
    status, found = verify(script(tmp_path, planted), TOY[1], "--steps=6", capsys=capsys)
    assert status == 1
    assert found["first_difference"].startswith("TRAIN, epoch 1, step 4: loss ")
    ours, theirs = found["trainer"]["steps"], found["speechbrain"]["steps"]
    assert ours[:3] == theirs[:3]
    assert ours[3]["loss"] != theirs[3]["loss"] or ours[3]["weights"] != theirs[3]["weights"]


@pytest.mark.usefixtures("in_forks")
def test_a_clip_of_another_value_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--loss_scale=4.0", "--dropout=0.0"]
    _, equal = verify(*TOY, *words, "--steps=6", capsys=capsys)
    clipped = [step["step"] for step in equal["trainer"]["steps"] if _clipped(step, 4.9)]
    assert clipped, "nothing is clipped: the test would find nothing"
    arguments = [*words, "--steps=6", "--trainer.gradient_clip_val=4.9"]
    status, found = verify(*TOY, *arguments, capsys=capsys)
    assert status == 1
    expected = f"TRAIN, epoch 1, step {clipped[0]}: gradients: 4 of 4"
    assert found["first_difference"].startswith(expected)


def _clipped(step: dict[str, Any], to: float) -> bool:
    return any(float(norm) > to for norm in step["norms"])


OWN = """
import sys, torch, speechbrain as sb
class Own(sb.Brain):
    def compute_forward(self, batch, stage):
        return self.modules.model(batch)
    def compute_objectives(self, predictions, batch, stage):
        return predictions.square().mean()
"""
WITHOUT_TRAINER = (
    OWN
    + """\
    def fit(self, data):
        self.on_fit_start()
        for self.step, batch in enumerate(data, 1):
            self.fit_batch(batch)
Own({"model": torch.nn.Linear(3, 1)}, torch.optim.Adam, {}, {"device": "cpu"}).fit(
    list(torch.rand(4, 2, 3))
)
"""
)


@pytest.mark.usefixtures("in_forks")
def test_two_runs_of_the_recipes_own_loop_are_no_proof(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = verify(script(tmp_path, WITHOUT_TRAINER), capsys=capsys)
    assert status == 1
    assert found["equal"]
    assert not found["verified"]
    assert (found["without_trainer"], found["own_loops"]) == (["Own"], ["Own.fit"])
    evidence = Evidence(trained={"Own": 4}, on_trainer={"Own": 0}, loops={"Own": ["Own.fit"]})
    event = {"kind": "hook", "hook": "zero_grad", "stage": "", "epoch": None, "step": 0}
    said = Comparison([event], [event], evidence).as_text().splitlines()[-1]
    assert said.startswith("NOT VERIFIED: no Trainer ran a batch of Own. Both sides ran the")
    ran = dataclasses.replace(evidence, on_trainer={"Own": 4})
    *_, verdict, note = Comparison([event], [event], ran).as_text().splitlines()
    assert verdict.startswith("EQUAL: ")
    assert note.startswith("Note: custom loop Own.fit. Both sides ran its code.")
    tested = Evidence(tested={"Own": 4, "Other": 1, "Idle": 0}, others={"Own": 4})
    assert tested.without_trainer == ["Other"]


def test_without_a_recorded_batch_nothing_is_equal() -> None:
    event = {"kind": "weights", "tensors": {}, "stage": "", "epoch": None, "step": 0}
    ran = Evidence(trained={"Own": 2}, on_trainer={"Own": 2})
    assert Comparison([event], [event], ran).verified
    for nothing in (Comparison([], [], ran), Comparison([event], [event], Evidence())):
        assert not nothing.verified
        verdict = nothing.as_text().splitlines()[-1]
        assert verdict.startswith("NOT VERIFIED: no batch of a Brain was recorded")


PORTED = """
import sys, torch, brain_lightning as bl
class Ported(bl.Brain):
    def compute_forward(self, batch, stage):
        return self.modules.model(batch)
    def compute_objectives(self, predictions, batch, stage):
        return predictions.square().mean()
class WithItsOwnLoop(Ported):
    def fit(self, data):
        self._fit_train(data, 1, False)
options = {"device": "cpu", "noprogressbar": True}
hparams = {"trainer": {"devices": 2}}
cls = globals()[sys.argv[1]]
brain = cls({"model": torch.nn.Linear(3, 1)}, torch.optim.Adam, hparams, options)
data = list(torch.rand(4, 2, 3))
if "evaluate" in sys.argv:
    brain.evaluate(data)
elif cls is Ported:
    brain.fit(range(1), data)
else:
    brain.fit(data)
"""


@pytest.mark.usefixtures("in_forks")
@pytest.mark.parametrize("words", ["Ported", "Ported evaluate", "WithItsOwnLoop"])
def test_a_ported_script_has_no_speechbrain_loop_to_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    assert main(["verify", script(tmp_path, PORTED), *words.split()]) == 2
    found = capsys.readouterr()
    assert not found.out
    says = "is a subclass of brain_lightning.Brain, so there is no SpeechBrain loop to compare"
    assert f"brain-lightning: error: {words.split()[0]} {says}" in found.err
    assert "port --verify" in found.err
    assert "Trainer(devices=2)" not in found.err


@pytest.mark.usefixtures("in_forks")
def test_a_recipe_that_fails_by_itself_is_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", script(tmp_path, "raise KeyError('wav')")]) == 2
    error = capsys.readouterr().err
    assert "the speechbrain side of verify ran no batch" in error
    assert "KeyError: 'wav'" in error


FAILS_LATER = (
    OWN
    + """\
Own({"model": torch.nn.Linear(3, 1)}, torch.optim.Adam, {}, {"device": "cpu"}).fit(
    range(1), list(torch.rand(2, 2, 3)), progressbar=False
)
sys.exit(3)
"""
)


@pytest.mark.usefixtures("in_forks")
def test_a_recipe_that_fails_on_both_sides_after_its_fit_is_not_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = verify(script(tmp_path, FAILS_LATER), capsys=capsys)
    assert status == 1
    assert found["equal"]
    assert (found["verified"], found["error"]) == (False, "exit status 3")
    event = {"kind": "error", "error": "RuntimeError: late", "stage": "", "epoch": None}
    failed = [{**event, "step": 2}]
    ran = Evidence(trained={"Own": 2}, on_trainer={"Own": 2})
    *_, said, verdict = Comparison(failed, failed, ran).as_text().splitlines()
    assert said == "The recipe raised an error on SpeechBrain's loop: RuntimeError: late"
    assert verdict.startswith("NOT VERIFIED: all events before the error are equal")
    *_, said, verdict = Comparison(failed, []).as_text().splitlines()
    assert said.endswith("RuntimeError: late")
    assert verdict.startswith("DIFFERENT: ")
