"""``brain-lightning run``, ``verify`` and ``doctor`` on recipes that know nothing of them."""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import speechbrain
from lightning.pytorch import Trainer

from brain_lightning import RunOptionError
from brain_lightning.cli.main import main
from brain_lightning.cli.run import processes_to_launch
from brain_lightning.compat.versions import accelerator
from tests.support.processes import TORCHRUN, check_python, python, variables
from tests.support.scripts import QUIET, TOY, result, same, script

# SpeechBrain's own.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def by_speechbrain(tmp_path: Path) -> dict[str, Any]:
    """What the toy recipe gives where it is run by itself."""
    folder = tmp_path / "speechbrain"
    check_python(*TOY, *QUIET, f"--output_folder={folder}", cwd=tmp_path)
    return result(folder)


def test_an_unedited_recipe_runs_on_a_trainer(
    tmp_path: Path, by_speechbrain: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    fit, arguments = speechbrain.Brain.fit, list(sys.argv)
    trainer = tmp_path / "trainer.yaml"
    trainer.write_text(
        f"logger: !new:lightning.pytorch.loggers.CSVLogger\n    save_dir: {tmp_path}\n"
        "callbacks:\n    - !new:lightning.pytorch.callbacks.Timer\nmax_epochs: 2\n"
    )
    words = [*TOY, *QUIET, f"--output_folder={tmp_path / 'ours'}", f"--trainer={trainer}"]
    assert main(["run", *words, "--trainer.max_epochs=-1"]) == 0
    ours = result(tmp_path / "ours")
    assert same(ours, by_speechbrain)
    assert ours["step"] == 18
    assert "TEST None" in capsys.readouterr().out
    metrics = list(tmp_path.glob("lightning_logs/*/metrics.csv"))
    assert any("valid_loss" in path.read_text() for path in metrics)
    assert speechbrain.Brain.fit is fit
    assert sys.argv == arguments


def test_overrides_and_trainer_arguments_reach_their_sides(tmp_path: Path) -> None:
    words = ["run", *TOY, *QUIET, "--lr", "0.2", "--trainer.max_steps=4"]
    assert main([*words, f"--output_folder={tmp_path}"]) == 0
    assert result(tmp_path)["step"] == 4


def test_a_trainer_may_be_in_the_recipes_own_yaml(tmp_path: Path) -> None:
    yaml = tmp_path / "toy.yaml"
    yaml.write_text(Path(TOY[1]).read_text() + "trainer:\n    max_steps: 5\n")
    assert main(["run", TOY[0], str(yaml), *QUIET, f"--output_folder={tmp_path}"]) == 0
    assert result(tmp_path)["step"] == 5


ONE_OF_EACH = """
import os
import speechbrain as sb
import speechbrain
import torch
from speechbrain import Brain
from speechbrain.core import Brain as CoreBrain
from helper import SETTING

os.chdir(os.path.dirname(os.path.abspath(__file__)))
losses = []
for base in (sb.Brain, sb.core.Brain, speechbrain.Brain, Brain, CoreBrain):
    class First(base):
        def compute_forward(self, batch, stage):
            return self.modules.model(batch)

    class Second(First):
        def compute_objectives(self, predictions, batch, stage):
            return predictions.square().mean()

    brain = Second({"model": torch.nn.Linear(3, 1)}, lambda p: torch.optim.SGD(p, SETTING),
                   run_opts={"device": "cpu"})
    brain.fit(range(1), [torch.ones(2, 3)] * 5, progressbar=False,
              train_loader_kwargs={"batch_size": None})
    losses.append(brain.optimizer_step)
with open("steps.txt", "w") as file:
    file.write(repr(losses))
"""


def test_every_way_to_name_the_brain_and_several_in_one_script(tmp_path: Path) -> None:
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "helper.py").write_text("SETTING = 0.1\n")
    assert main(["run", script(folder, ONE_OF_EACH), "--trainer.max_steps=2"]) == 0
    assert (folder / "steps.txt").read_text() == "[2, 2, 2, 2, 2]"
    sys.modules.pop("helper", None)


def test_a_recipe_on_our_brain_runs_too(tmp_path: Path) -> None:
    theirs = "(sb.Brain, sb.core.Brain, speechbrain.Brain, Brain, CoreBrain)"
    text = ONE_OF_EACH.replace(theirs, "(brain_lightning.Brain,)")
    (tmp_path / "helper.py").write_text("SETTING = 0.1\n")
    path = script(tmp_path, "import brain_lightning\n" + text)
    assert main(["run", path, "--trainer.max_steps=3"]) == 0
    assert (tmp_path / "steps.txt").read_text() == "[3]"
    sys.modules.pop("helper", None)


def test_several_processes_are_started_as_torchrun_would(tmp_path: Path) -> None:
    words = ["-m", "brain_lightning", "run", *TOY, *QUIET, "--trainer.devices=2"]
    check_python(*words, f"--output_folder={tmp_path / 'ours'}", cwd=tmp_path, real=True)
    gloo = ["--distributed_backend=gloo", f"--output_folder={tmp_path / 'theirs'}"]
    check_python(*TORCHRUN, *TOY, *QUIET, *gloo, cwd=tmp_path, real=True)
    for rank in (0, 1):
        assert same(result(tmp_path / "ours", rank), result(tmp_path / "theirs", rank))
    assert result(tmp_path / "ours")["step"] == 9
    # run_on_main of the script holds.
    assert (tmp_path / "ours" / "prepared.txt").read_text() == "rank 0\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "nowhere.py"], "there is no script 'nowhere.py' here"),
        (["run", *TOY, "--trainer.max_step=3"], "did you mean 'max_steps'"),
        (["run", *TOY, "--trainer=nowhere.yaml"], "--trainer=nowhere.yaml: No such file"),
        (["run", *TOY, f"--trainer={TOY[0]}"], "toy.py: "),
        (["run", *TOY, "--trainer.devices=[0,1]"], "CUDA_VISIBLE_DEVICES"),
        (["run", *TOY, "--trainer.num_nodes=2"], "start each node yourself"),
        (["run", *TOY, *QUIET, "--trainer.strategy=ddp_spawn"], "start_method='spawn'"),
        (["verify", "nowhere.py"], "there is no script 'nowhere.py' here"),
        (["doctor", "nowhere.py"], "nowhere.py: No such file"),
    ],
)
def test_a_users_mistake_is_told_without_a_traceback(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [*words, f"--output_folder={tmp_path}"] if words[0] == "run" else words
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "brain-lightning: error: " in error
    assert says in error
    assert "Traceback" not in error


def test_a_traceback_comes_where_it_is_asked_for() -> None:
    with pytest.raises(RunOptionError, match="max_steps"):
        main(["run", *TOY, "--trainer.max_step=3", "--debug-traceback"])


def test_an_error_of_the_recipes_own_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        main(["run", script(tmp_path, "1 / 0")])


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ([], ["run", "verify", "doctor", "--trainer.devices=2"]),
        (["run"], ["--grad_accumulation_factor", "--trainer.max_steps", "--trainer FILE"]),
        (["verify"], ["--steps N", "--json"]),
        (["doctor"], ["--json"]),
    ],
)
def test_help(words: list[str], shown: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    for text in shown:
        assert text in out


def test_a_call_without_words_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 0
    assert "usage: brain-lightning COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("trainer", "processes"),
    [({}, 1), ({"devices": 3}, 3), ({"devices": "2"}, 2), ({"devices": "auto"}, 1)],
)
def test_processes_are_as_many_as_devices(trainer: dict[str, Any], processes: int) -> None:
    if trainer.get("devices") == "auto":
        processes = max(1, accelerator.device_count())
    assert processes_to_launch(trainer) == processes


def test_torchruns_processes_start_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    assert processes_to_launch({"devices": 2}) == 1


# ------------------------------------------------------------------------------- verify


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
    assert "equal: every event is the same on both sides, bit for bit" in shown
    # Six batches an epoch: two of the second one.
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
    assert found["first_difference"].startswith("TRAIN, epoch 1, step 4: the loss is ")
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
    expected = f"TRAIN, epoch 1, step {clipped[0]}: gradient of 'model.0.weight' differs, of 4"
    assert found["first_difference"].startswith(expected)


def _clipped(step: dict[str, Any], to: float) -> bool:
    return any(float(norm) > to for norm in step["norms"])


@pytest.mark.usefixtures("in_forks")
def test_a_recipe_that_fails_by_itself_is_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", script(tmp_path, "raise KeyError('wav')")]) == 2
    error = capsys.readouterr().err
    assert "no batch was run on the side of speechbrain" in error
    assert "KeyError: 'wav'" in error


# ------------------------------------------------------------------------------- doctor


GAN = """\
import speechbrain as sb
from base import Shared

class GAN(Shared):
    def fit_batch(self, batch):
        loss = self.modules.g.module(batch)
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
    remarks = {remark["about"]: remark["line"] for remark in report["remarks"]}
    assert remarks == {
        "strategy=ddp": 10, "devices": 19, "gradient_clip_val": 5,
        "gradient_clip_algorithm": 5, "accumulate_grad_batches": 5, "precision": 5,
    }  # fmt: skip
    says = {remark["about"]: remark["says"] for remark in report["remarks"]}
    assert says["gradient_clip_algorithm"].startswith("'value' is refused")
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
    assert "ddp (each entry" in shown
    assert "change" not in shown


def test_doctor_takes_what_the_other_commands_take(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", TOY[0]]) == 0
    alone = capsys.readouterr().out
    rest = ["nowhere.yaml", "--lr=0.1", "--trainer.max_steps=2", "--debug", "--noprogressbar"]
    assert main(["doctor", TOY[0], *rest]) == 0
    assert capsys.readouterr().out == alone


def test_doctor_lists_the_exceptions_in_lines_that_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script(tmp_path, BASE, "base.py")
    path = script(tmp_path, GAN)
    main(["doctor", path, "--json"])
    safe = json.loads(capsys.readouterr().out)["brains"][0]["arguments"]
    main(["doctor", path])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith("train.py:4: GAN, a subclass of SpeechBrain's Brain")
    assert all(len(line) <= 100 for line in lines)
    assert all(line.startswith("  ") for line in lines)
    text = " ".join(" ".join(lines).split())
    said = re.search(r"arguments safe: all of Lightning's but ([\w, ]+) callbacks ", text)
    assert said is not None
    others = set(said[1].split(", "))
    assert {"precision", "gradient_clip_val", "strategy"} <= others
    # Every argument is on one side, as in the JSON.
    assert others == inspect.signature(Trainer).parameters.keys() - set(safe)


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
    assert "call self.modules.Encoder" in remarks["strategy=ddp"][1]
    assert remarks["accumulate_grad_batches"][1].startswith("an incomplete last window")
    assert report["strategies"] == ["one device"]
    assert {"precision", "gradient_clip_val"} <= set(report["arguments"])
    assert report["uses"]["clip_grad_norm_()"] == ["train.py:13"]


def test_doctor_says_that_a_training_loop_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "import brain_lightning as bl\nclass B(bl.Brain):\n    def _fit_train(self): pass\n"
    main(["doctor", script(tmp_path, text)])
    assert "change      line 3: _fit_train: refused before training" in capsys.readouterr().out


def test_doctor_of_a_script_without_brain_or_python(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", script(tmp_path, "x = 1")]) == 0
    assert "no subclass of Brain" in capsys.readouterr().out
    assert main(["doctor", script(tmp_path, "def (")]) == 2
    assert "line 1: invalid syntax" in capsys.readouterr().err


def test_a_file_that_is_not_there_and_an_override_of_nothing_are_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = script(
        tmp_path,
        "import sys\nfrom hyperpyyaml import load_hyperpyyaml\n"
        "load_hyperpyyaml(open(sys.argv[1]), sys.argv[2].lstrip('-').replace('=', ': '))",
    )
    (tmp_path / "hparams.yaml").write_text("lr: 0.1\n")
    assert main(["run", recipe, "hparams.yml"]) == 2
    assert "there is no hyperparameters file 'hparams.yml'" in capsys.readouterr().err
    assert main(["run", recipe, str(tmp_path / "hparams.yaml"), "--rl=0.2"]) == 2
    assert "Override 'rl' not found in: ['lr']; --name=value" in capsys.readouterr().err
