"""``--profile_training`` writes the same trace file as SpeechBrain, and ends the script."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from brain_lightning import RunOptionError, to_lightning
from tests.support.brains import Manual, loader, make, trainer_with

OPTIONS = {"profile_training": True, "profile_warmup": 2, "profile_steps": 3}


@pytest.mark.filterwarnings("ignore:Profiler")  # torch's, about the function itself
@pytest.mark.parametrize("brain_class", [type(make()), Manual], ids=["automatic", "manual"])
@pytest.mark.parametrize("own_trainer", [True, False], ids=["fit", "users_trainer"])
def test_steps_are_profiled_and_the_script_ends(
    tmp_path: Path, brain_class: type, own_trainer: bool
) -> None:
    brain = make(brain_class, hparams={"output_folder": str(tmp_path)}, **OPTIONS)
    trainer = trainer_with()
    module = to_lightning(brain)
    start = partial(brain.fit, range(5)) if own_trainer else partial(trainer.fit, module)
    with pytest.raises(SystemExit) as end:
        start(loader(), loader())
    assert not end.value.code
    assert brain.step == 5
    (trace,) = (tmp_path / "profiler_logs").glob("*.pt.trace.json")
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::mse_loss" in names
    assert {f"ProfilerStep#{n}" for n in (2, 3, 4)} <= names
    assert type(trainer.profiler).__name__ == "PassThroughProfiler"


def test_evaluation_is_not_profiled(tmp_path: Path) -> None:
    brain = make(hparams={"output_folder": str(tmp_path)}, **OPTIONS)
    brain.evaluate(loader())
    assert not list(tmp_path.glob("profiler_logs/*"))


def test_without_a_folder_it_is_refused() -> None:
    with pytest.raises(RunOptionError, match=r"Set output_folder in hparams"):
        make(**OPTIONS).fit(range(1), loader())


def test_two_profilers_exclude_each_other(tmp_path: Path) -> None:
    brain = make(hparams={"output_folder": str(tmp_path)}, **OPTIONS)
    words = r"profile_training and Trainer\(profiler=SimpleProfiler\) cannot be used"
    with pytest.raises(RunOptionError, match=words):
        brain.fit(range(1), loader(), trainer={"profiler": "simple"})


@pytest.mark.filterwarnings("ignore:Profiler")
def test_validation_does_not_count(tmp_path: Path) -> None:
    brain = make(hparams={"output_folder": str(tmp_path)}, **OPTIONS)
    with pytest.raises(SystemExit):
        brain.fit(range(9), loader(8), loader())
    (trace,) = (tmp_path / "profiler_logs").glob("*.pt.trace.json")
    events = json.loads(trace.read_text())["traceEvents"]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep#")}
    assert {"ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"} <= steps
    assert "ProfilerStep#7" not in steps
