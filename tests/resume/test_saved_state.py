"""Files of older versions are read. Files of newer versions raise an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from brain_lightning.checkpoints.state_files import load_state, write_state
from brain_lightning.errors import CheckpointError
from brain_lightning.resume import saved_state
from brain_lightning.resume.process_state import mean_window
from brain_lightning.resume.run_state import KEY
from tests.support.golden import version_0
from tests.support.golden.version_0 import Small, fit, fit_with_trainer, new

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The loaded checkpoint was produced with Lightning"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files that brain_lightning 0.1.0 has written."""
    version_0.extract(tmp_path)
    return tmp_path


def assert_ends_as_expected(brain: Small, epochs: set[str]) -> None:
    expected = json.loads(version_0.EXPECTED.read_text())
    found = version_0.outcome(brain)
    for name in ("weight", "bias"):
        # Another CPU may round the last bit differently.
        one, other = torch.tensor(found[name]), torch.tensor(expected[name])
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert found["optimizer_step"] == expected["optimizer_step"]
    # Epochs that end after the checkpoint, with all losses of each epoch.
    assert found["sums"].keys() == epochs
    for epoch in epochs:
        assert found["sums"][epoch] == pytest.approx(expected["sums"][epoch], abs=1e-6)


def test_the_expected_weights_are_those_of_a_run_that_never_stopped() -> None:
    brain = new()
    torch.manual_seed(3)
    assert_ends_as_expected(fit(brain), {"1", "2", "3"})


CASES = [("within", {"2", "3"}), ("end", {"3"})]


@pytest.mark.parametrize(("name", "epochs"), CASES)
def test_directories_of_0_1_0_are_resumed(folder: Path, name: str, epochs: set[str]) -> None:
    assert_ends_as_expected(fit(new(folder / name)), epochs)


class Counts(Callback):
    """Returns the final counts of a Trainer: steps, epochs and batches."""

    def on_train_end(self, trainer: Any, module: Any) -> None:
        batches = module.run.train.batches
        self.found = [trainer.global_step, trainer.current_epoch, batches]


@pytest.mark.parametrize(("name", "epochs"), CASES)
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be")
def test_files_of_0_1_0_are_resumed(folder: Path, name: str, epochs: set[str]) -> None:
    counts = Counts()
    brain = fit_with_trainer(new(), counts, path=folder / f"{name}.ckpt")
    assert_ends_as_expected(brain, epochs)
    whole = version_0.EPOCHS * version_0.BATCHES
    assert counts.found == [brain.optimizer_step, version_0.EPOCHS, whole]


def newer(states: Any) -> Any:
    for state in states["processes"]:
        state["version"] = saved_state.VERSION + 1
    return states


WORDS = rf"as version {saved_state.VERSION + 1}.*up to {saved_state.VERSION}\. Upgrade"


@pytest.mark.parametrize("name", ["within", "end"])
def test_a_newer_directory_is_refused(tmp_path: Path, name: str) -> None:
    def run(cut: Any = None) -> Small:
        brain = new(tmp_path, steps=3 if name == "within" else 0)
        brain.cut = cut
        return fit(brain)

    with pytest.raises(version_0.Cut):
        run(lambda brain: brain.step == 5 and brain.hparams.epoch_counter.current == 2)
    newest = max(tmp_path.glob("CKPT*"))
    file = newest / f"{KEY}.ckpt"
    write_state(newer(load_state(file)), file)
    (newest / "checksums.yaml").unlink()
    with pytest.raises(CheckpointError, match=WORDS):
        run()


def test_a_newer_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "within.ckpt"
    fit_with_trainer(new(), version_0.Saves(path))
    saved = torch.load(path, weights_only=False)
    newer(saved[KEY]["states"][KEY])
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=WORDS):
        fit_with_trainer(new(), path=path)


@pytest.mark.parametrize("version", [saved_state.VERSION + 1, 99])
def test_the_words_name_the_version(version: int) -> None:
    with pytest.raises(
        CheckpointError, match=rf"version {version}, .*Upgrade brain_lightning"
    ):
        saved_state.migrated({"version": version}, end_of_epoch=True)


def test_a_window_of_version_2_has_no_weights_and_of_several_processes_their_mean() -> None:
    old = saved_state.migrated({"version": 2, "epoch": None}, end_of_epoch=True)
    assert old["window"] == {"weight": None, "reference": 1.0} == mean_window([{}, {}])
    windows = [{"window": {"weight": weight, "reference": 8.0}} for weight in (3.0, 5.0)]
    # Like the gradients, the weights are averaged.
    assert mean_window(windows) == {"weight": 4.0, "reference": 8.0}
