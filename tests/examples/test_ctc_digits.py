"""examples/ctc_digits: runs as a script, and on SpeechBrain with other imports alone."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples" / "ctc_digits"
HELPERS = ("annealing", "curves", "decoding", "digit_lines", "model")
TINY = ["--number_of_epochs=2", "--train_lines", "48", "--valid_lines=20", "--test_lines=20"]
# What changes where the recipe runs on SpeechBrain.
IMPORTS = {
    "from brain_lightning import": "from speechbrain import",
    "brain_lightning.EpochCounter": "speechbrain.utils.epoch_loop.EpochCounter",
}


@pytest.fixture
def recipe_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder of the script is on the path, as where it is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in HELPERS:
        sys.modules.pop(name, None)


def load(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(folder: Path, output: Path) -> tuple[Any, float]:
    """Runs the recipe that lies in ``folder`` on a few lines."""
    arguments = [str(folder / "hparams.yaml"), *TINY, f"--output_folder={output}"]
    return load(folder / "train.py").main([*arguments, "--device=cpu", "--noprogressbar"])


def ported(folder: Path) -> Path:
    """The recipe with other imports, in a folder of its own."""
    folder.mkdir()
    for name in ("train.py", "hparams.yaml"):
        text = (FOLDER / name).read_text()
        for ours, theirs in IMPORTS.items():
            text = text.replace(ours, theirs)
        (folder / name).write_text(text)
    return folder


def test_it_gives_the_same_numbers_on_speechbrain(recipe_folder: None, tmp_path: Path) -> None:
    ours, our_loss = run(FOLDER, tmp_path / "ours")
    theirs, their_loss = run(ported(tmp_path / "ported"), tmp_path / "theirs")
    assert "speechbrain" in type(theirs).__mro__[1].__module__
    assert our_loss == their_loss
    assert ours.history == theirs.history
    assert ours.digit_errors.rate == theirs.digit_errors.rate
    state = theirs.modules.state_dict()
    for name, tensor in ours.modules.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_it_runs_as_a_script(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "train.py"), str(FOLDER / "hparams.yaml")]
    done = subprocess.run(
        [*command, *TINY, "--seed=7"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "epoch  2" in done.stdout
    assert "epoch  3" not in done.stdout
    assert "test digit error rate" in done.stdout
    assert "train_loss=" in done.stderr
    assert (tmp_path / "results" / "ctc_digits" / "7" / "curves.png").stat().st_size > 10_000


def test_no_scan_is_in_two_of_the_sets(recipe_folder: None) -> None:
    import digit_lines

    sets = {name: digit_lines.load_split(name)[0] for name in digit_lines.SPLITS}
    scans = [tuple(scan.flatten().tolist()) for images in sets.values() for scan in images]
    assert len(scans) == 1797
    assert len(set(scans)) == len(scans)
