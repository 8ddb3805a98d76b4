"""``brain-lightning run`` on unmodified recipes; help texts, versions, and users' mistakes."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import speechbrain

from brain_lightning import RunOptionError
from brain_lightning.cli import main as main_module
from brain_lightning.cli.main import main
from tests.support.processes import check_python
from tests.support.scripts import QUIET, TOY, result, same, script

# SpeechBrain raises warnings.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def by_speechbrain(tmp_path: Path) -> dict[str, Any]:
    """The result of the toy recipe on SpeechBrain's loop."""
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


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "nowhere.py"], "script 'nowhere.py' was not found in "),
        (["run", *TOY, "--trainer.max_step=3"], "Did you mean 'max_steps'"),
        (["run", *TOY, "--trainer=nowhere.yaml"], "--trainer=nowhere.yaml: No such file"),
        (["run", *TOY, f"--trainer={TOY[0]}"], "toy.py: "),
        (["run", *TOY, "--trainer.devices=[0,1]"], "CUDA_VISIBLE_DEVICES"),
        (["run", *TOY, "--trainer.num_nodes=2"], "Start each node with torchrun"),
        (["run", *TOY, *QUIET, "--trainer.strategy=ddp_spawn"], "start_method='spawn'"),
        (["verify", "nowhere.py"], "script 'nowhere.py' was not found in "),
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


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_the_versions_for_a_bug_report(
    option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main_module, "PACKAGES", ("torch", "lightning", "not-installed"))
    with pytest.raises(SystemExit) as end:
        main([option])
    assert end.value.code == 0
    ours, python, *others = capsys.readouterr().out.splitlines()
    assert ours == f"brain-lightning {version('brain_lightning')}"
    assert python.startswith(f"Python {platform.python_version()} on ")
    assert others == [
        f"torch {version('torch')}",
        f"lightning {version('lightning')}",
        "not-installed is not installed",
    ]


@pytest.mark.parametrize(
    ("words", "status"), [(["--version"], 0), (["--help"], 0), ([], 0), (["walk"], 2)]
)
def test_the_module_is_the_same_command(words: list[str], status: int) -> None:
    """``python -m brain_lightning`` prints the same. Neither command imports torch for it."""
    script = str(Path(sys.executable).with_name("brain-lightning"))
    started = [sys.executable, "-X", "importtime", "-m", "brain_lightning"]
    of_module, of_script = (
        subprocess.run([*start, *words], capture_output=True, text=True, check=False)
        for start in (started, [script])
    )
    assert of_module.returncode == of_script.returncode == status
    assert of_module.stdout == of_script.stdout
    assert of_script.stderr in of_module.stderr
    assert "| torch\n" not in of_module.stderr


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
    assert "hyperparameters file 'hparams.yml' was not found in " in capsys.readouterr().err
    assert main(["run", recipe, str(tmp_path / "hparams.yaml"), "--rl=0.2"]) == 2
    assert (
        "Override 'rl' not found in: ['lr']. --name=value must be a key"
        in capsys.readouterr().err
    )
