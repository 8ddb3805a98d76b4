"""``brain-lightning doctor``: its report on a script, which it does not run."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from brain_lightning.cli.main import main
from brain_lightning.doctor import examine
from brain_lightning.doctor.remark import ARGUMENTS
from brain_lightning.doctor.updates import STEP_ARGUMENTS
from tests.support.scripts import TOY, script

# SpeechBrain raises warnings.
pytestmark = pytest.mark.filterwarnings("ignore")


GAN = """\
import speechbrain as sb
from base import Shared

class GAN(Shared):
    def fit_batch(self, batch):
        loss = (self.modules.g.module if self.distributed_launch else self.modules.g)(batch)
        self.scaler.scale(loss).backward()
        return loss

    def on_fit_start(self):
        self.init_optimizers()

    def _fit_valid(self, valid_set, epoch, enable):
        super()._fit_valid(valid_set, epoch, enable)

class NoBrain:
    pass

GAN({}, None)
"""
BASE = """\
from speechbrain.core import Brain as B

class Shared(B):
    def init_optimizers(self):
        pass
"""


def test_doctor_reads_a_gan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script(tmp_path, BASE, "base.py")
    path = script(tmp_path, GAN)
    assert main(["doctor", path, "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["brains"]
    assert (report["name"], report["line"]) == ("GAN", 4)
    assert report["base"] == "SpeechBrain's Brain"
    assert report["overrides"] == {
        "init_optimizers": "base.py:4", "fit_batch": "train.py:5",
        "on_fit_start": "train.py:10", "_fit_valid": "train.py:13",
    }  # fmt: skip
    assert report["updates"] == "manual"
    assert report["why"] == "fit_batch is overridden (train.py:5)"
    assert report["uses"] == {
        "self.scaler": ["train.py:7"], ".module": ["train.py:6"],
        "super()._fit_valid (private)": ["train.py:14"], "backward()": ["train.py:7"],
    }  # fmt: skip
    assert report["strategies"] == ["one device"]
    remarks = {remark["about"]: remark["line"] for remark in reversed(report["remarks"])}
    assert remarks == {
        "strategy=ddp": 10, "gradient_clip_val": 5,
        "gradient_clip_algorithm": 5, "accumulate_grad_batches": 5, "precision": 5,
    }  # fmt: skip
    says = {remark["about"]: remark["says"] for remark in report["remarks"]}
    assert says["gradient_clip_algorithm"].startswith("'value' is not supported")
    assert not {"gradient_clip_val", "precision"} & set(report["arguments"])
    assert "max_steps" in report["arguments"]
    assert "GradientAccumulationScheduler" in report["callbacks_refused"]


def test_doctor_has_nothing_to_say_about_a_plain_recipe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", TOY[0]]) == 0
    shown = capsys.readouterr().out
    assert f"{TOY[0]}:11: ToyBrain, a subclass of SpeechBrain's Brain" in shown
    assert "automatic: neither fit_batch nor optimizers_step is overridden" in shown
    assert "compute_forward (toy.py:12)" in shown
    assert "ddp (one DistributedDataParallel per entry" in shown
    assert "not supported with fsdp2: WeightAveraging; " in shown
    assert "change" not in shown


def test_doctor_takes_what_the_other_commands_take(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", *TOY]) == 0
    alone = capsys.readouterr().out
    rest = ["--lr=0.1", "--trainer.max_steps=2", "--debug", "--noprogressbar"]
    assert main(["doctor", *TOY, *rest]) == 0
    assert capsys.readouterr().out == alone
    assert main(["doctor", TOY[0], "nowhere.yaml"]) == 2
    assert "hyperparameters file 'nowhere.yaml' was not found" in capsys.readouterr().err


def test_doctor_lists_the_exceptions_in_lines_that_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script(tmp_path, BASE, "base.py")
    path = script(tmp_path, GAN)
    main(["doctor", path, "--json"])
    safe = json.loads(capsys.readouterr().out)["brains"][0]["arguments"]
    main(["doctor", path])
    first, *lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert first.endswith("train.py:4: GAN, a subclass of SpeechBrain's Brain")
    assert all(len(line) <= 100 for line in lines)
    assert all(line.startswith("  ") for line in lines)
    text = " ".join(" ".join(lines).split())
    said = re.search(r"arguments supported: all of Lightning's, (.+) callbacks ", text)
    assert said is not None
    # Every argument that is not in the JSON is named, except two that always work.
    arguments = inspect.signature(Trainer).parameters.keys()
    always = {"limit_predict_batches", "default_root_dir"}
    named = arguments & set(re.findall(r"\w+", said[1]))
    assert named >= arguments - set(safe) - always
    assert not named & always
    limited = re.search(
        r"no effect, or an error \(see change\): ([\w, ]+) strategy: ", said[1]
    )
    assert limited is not None
    assert set(limited[1].split(", ")) == {*ARGUMENTS} - set(safe)
    assert "precision" in limited[1]
    assert "strategy: only the strategies above" in said[1]
    assert "plugins: cluster environments, " in said[1]


AROUND = """\
import speechbrain as sb

class Separation(sb.Brain):
    def compute_forward(self, batch, stage):
        if stage == sb.Stage.TRAIN:
            self.fit([1], batch)
        return self.hparams.Encoder(batch)

    def fit_batch(self, batch):
        with torch.autocast("cuda", self.precision):
            loss = self.compute_forward(batch, None)
        self.scaler.scale(loss / self.grad_accumulation_factor).backward()
        torch.nn.utils.clip_grad_norm_(self.modules.parameters(), self.max_grad_norm)

sb.utils.distributed.ddp_init_group({})
"""


PORTED_IN_PART = """
import speechbrain as sb
from brain_lightning import Brain


class Ported(Brain):
    def compute_forward(self, batch, stage):
        return self.modules.model(batch)

    def compute_objectives(self, predictions, batch, stage):
        return predictions.mean()


sb.utils.distributed.ddp_init_group({})
"""


def test_doctor_warns_of_a_group_that_lightnings_processes_would_wait_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", script(tmp_path, PORTED_IN_PART)]) == 0
    line = PORTED_IN_PART.splitlines().index("sb.utils.distributed.ddp_init_group({})") + 1
    assert f"change      line {line}: devices: python train.py" in capsys.readouterr().out


def test_doctor_sees_what_is_called_around_the_modules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", script(tmp_path, AROUND), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["brains"]
    remarks = {
        remark["about"]: (remark["line"], remark["says"]) for remark in report["remarks"]
    }
    assert remarks.keys() == {
        "fit", "strategy=ddp", "gradient_clip_algorithm", "accumulate_grad_batches"
    }  # fmt: skip
    assert remarks["fit"][0] == 6
    assert remarks["strategy=ddp"][0] == 7
    assert "Call self.modules.Encoder" in remarks["strategy=ddp"][1]
    assert remarks["accumulate_grad_batches"][1].startswith(
        "An incomplete last accumulation window"
    )
    assert [text.split()[0] for text in report["strategies"]] == ["one", "fsdp2"]
    assert {"precision", "gradient_clip_val"} <= set(report["arguments"])
    assert report["uses"]["clip_grad_norm_()"] == ["train.py:13"]


def test_doctor_of_a_script_without_brain_or_python(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", script(tmp_path, "x = 1")]) == 0
    assert "no subclass of Brain" in capsys.readouterr().out
    assert main(["doctor", script(tmp_path, "def (")]) == 2
    assert "line 1: invalid syntax" in capsys.readouterr().err


WITHOUT_ARGUMENTS = """
import helper
import speechbrain as sb

class Plain(sb.Brain):
    pass
"""


@pytest.mark.parametrize(
    ("text", "helper", "ignores"),
    [
        ("", "", True),
        ("sb.parse_arguments([])", "", False),
        ("", "from brain_lightning import parse_arguments as parse", False),
        ("", "import argparse", False),
        ("import sys; sys.argv", "", False),
        ("", "def (", False),
    ],
)
def test_doctor_says_that_a_script_ignores_its_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, helper: str, ignores: bool
) -> None:
    script(tmp_path, helper, "helper.py")
    path = script(tmp_path, WITHOUT_ARGUMENTS + text)
    assert main(["doctor", path]) == 0
    says = f"{path}: The script does not call parse_arguments. It ignores run options"
    assert (says in " ".join(capsys.readouterr().out.split())) == ignores
    main(["doctor", path, "--json"])
    assert json.loads(capsys.readouterr().out)["ignores_command_line"] == ignores


BESIDE = """
import torch
import speechbrain as sb
from torch.amp import autocast

class Beside(sb.Brain):
    def compute_forward(self, batch, stage):
        return self.modules.model(batch)

    def compute_objectives(self, predictions, batch, stage):
        {}
        return predictions.sum()
"""


@pytest.mark.parametrize(
    ("text", "unsafe"),
    [
        ("self.hparams.scheduler.step()", set()),
        ("with torch.autocast('cpu', enabled=False): self.modules.a(batch)", {"precision"}),
        ("with autocast('cuda'): self.modules.a(batch)", {"precision"}),
        ("self.modules.disc(batch).sum().backward()", set(STEP_ARGUMENTS)),
        ("self.disc_opt.step()", set(STEP_ARGUMENTS)),
    ],
)
def test_doctor_sees_what_is_beside_brains_own_step(
    tmp_path: Path, text: str, unsafe: set[str]
) -> None:
    (brain,) = examine(script(tmp_path, BESIDE.format(text))).brains
    assert {*ARGUMENTS} - {*brain.arguments} - {"devices"} == unsafe
