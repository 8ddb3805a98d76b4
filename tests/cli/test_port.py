"""``brain-lightning port``: the example of the guide, its output, and its verification."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest

from brain_lightning.cli.main import main
from tests.support.processes import ROOT, python, variables
from tests.support.scripts import script

EXAMPLE = ROOT / "examples" / "porting"
# Custom clipping and accumulation, with Adam, which shows a missing update.
BY_HAND = """\
import sys
import speechbrain as sb
import torch
from data import batches
from hyperpyyaml import load_hyperpyyaml


class Toy(sb.Brain):
    def compute_forward(self, batch, stage):
        return self.modules.model(batch[0])

    def compute_objectives(self, predictions, batch, stage):
        return torch.nn.functional.mse_loss(predictions, batch[1])

    def fit_batch(self, batch):
        outputs = self.compute_forward(batch, sb.Stage.TRAIN)
        loss = self.compute_objectives(outputs, batch, sb.Stage.TRAIN)
        (loss / self.hparams.every).backward()
        if self.step % self.hparams.every == 0:
            torch.nn.utils.clip_grad_norm_(self.modules.parameters(), self.hparams.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach().cpu()


if __name__ == "__main__":
    hparams_file, run_opts, overrides = sb.parse_arguments(sys.argv[1:])
    sb.utils.distributed.ddp_init_group(run_opts)
    with open(hparams_file) as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    torch.manual_seed(hparams["seed"])
    brain = Toy(
        {"model": hparams["model"]}, torch.optim.Adam, hparams, run_opts,
        hparams["checkpointer"],
    )
    brain.fit(hparams["counter"], batches(7), batches(2))
"""
HPARAMS = """\
seed: 7
output_folder: results
every: 2
clip: 0.05
model: !new:torch.nn.Linear [8, 1]
counter: !new:speechbrain.utils.epoch_loop.EpochCounter
    limit: 2
checkpointer: !new:speechbrain.utils.checkpoints.Checkpointer
    checkpoints_dir: !ref <output_folder>/save
    recoverables: {model: !ref <model>, counter: !ref <counter>}
"""
DATA = """\
import torch
def batches(n):
    return [(torch.rand(4, 8), torch.rand(4, 1)) for _ in range(n)]
"""


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    ignored = shutil.ignore_patterns("results", "__pycache__")
    shutil.copytree(EXAMPLE, tmp_path / "porting", ignore=ignored)
    monkeypatch.chdir(tmp_path / "porting")
    return tmp_path / "porting"


def test_the_port_of_the_example_is_the_example_after_it(
    example: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["port", "before/train.py", "before/hparams.yaml"]
    assert main([*words, "--out", "out"]) == 0
    assert capsys.readouterr().out.split() == [
        "out/train.py", "out/tones_prepare.py", "out/hparams.yaml",
    ]  # fmt: skip
    assert Path("out/train.py").read_text() == (example / "after/train.py").read_text()
    # The lines that a user adds: another folder, and arguments that the recipe did not have.
    after = Path("after/hparams.yaml").read_text()
    after = re.sub(r"\n# -+ trainer\n.*", "", after, flags=re.DOTALL)
    ported = Path("out/hparams.yaml").read_text()
    assert ported.replace("results/before", "results/after") == after
    # A second port changes nothing, and reports it.
    assert main(["port", "out/train.py", "out/hparams.yaml"]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "out/train.py: ported completely: 0 lines changed" in shown.err


def test_a_mistake_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["port", "train.py"]) == 2
    assert "script 'train.py' was not found in " in capsys.readouterr().err
    path = script(tmp_path, "print()")
    assert main(["port", path]) == 1
    assert (
        "train.py:1: There is no subclass of Brain, so there is nothing to port."
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit, match="2"):
        main(["port", path, "--lr=0.1"])
    assert "--lr=0.1: overrides need --verify" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["port", path]) == 2
    assert (
        "port needs LibCST. Run pip install 'brain_lightning[port]'."
        in capsys.readouterr().err
    )


def test_a_script_that_ignores_its_command_line_is_still_ported_completely(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "import speechbrain as sb\nclass Toy(sb.Brain):\n    pass\n"
    says = "train.py: The script does not call parse_arguments. It ignores run options"
    path = script(tmp_path, text)
    assert main(["port", path]) == 0
    shown = capsys.readouterr().err
    assert says in shown
    assert "ported completely" in shown
    script(tmp_path, f"{text}sb.parse_arguments([])\n")
    assert main(["port", path]) == 0
    assert says not in capsys.readouterr().err


def test_both_sides_are_run_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In separate processes, from the original files, before ``--write`` changes them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", variables()["PYTHONPATH"])
    monkeypatch.setattr(sys, "executable", python())
    for name, text in {"train.py": BY_HAND, "h.yaml": HPARAMS, "data.py": DATA}.items():
        Path(name).write_text(text)
    words = ["port", "train.py", "h.yaml", "--verify", "--steps=0", "--device=cpu"]
    assert main([*words, "--write"]) == 0
    shown = capsys.readouterr()
    assert shown.out.split() == ["train.py", "h.yaml"]
    assert "EQUAL: all events are bitwise identical on both sides." in shown.err
    # Three updates per epoch, each with clipping, and different weights after each.
    steps = re.findall(r"^(\d) +(\d) .* 0\.05 +0\.05 +(\w{8}) +\3$", shown.err, re.MULTILINE)
    assert [(int(e), int(n)) for e, n, _ in steps] == [
        (1, 2), (1, 4), (1, 6), (2, 2), (2, 4), (2, 6),
    ]  # fmt: skip
    assert len({weights for *_, weights in steps}) == 6
    assert "class Toy(Brain)" in Path("train.py").read_text()
    assert "\ntrainer:\n    gradient_clip_val: !ref <clip>\n" in Path("h.yaml").read_text()
