"""The processes of ``brain-lightning run``: who starts them, and their process group."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.plugins.environments import SLURMEnvironment

from brain_lightning.cli import processes as process_module
from brain_lightning.cli import run
from brain_lightning.cli.main import main
from brain_lightning.cli.processes import processes_to_launch
from brain_lightning.cli.script import processes_in_file
from brain_lightning.compat.versions import accelerator
from tests.support.processes import LAUNCHERS, TORCHRUN, check_python, python
from tests.support.scripts import QUIET, RECIPES, TOY, result, same, script

# SpeechBrain's own.
pytestmark = pytest.mark.filterwarnings("ignore")

RECIPE = str(RECIPES / "own_loader.py")
COMMAND = ("-m", "brain_lightning", "run")
GLOO = "--distributed_backend=gloo"
OWN = {"MAKES_ITS_GROUP": "yes"}


def test_two_processes_learn_what_torchruns_do(tmp_path: Path) -> None:
    """With SpeechBrain's Brain and ours, a process group of the recipe's own or none."""
    yaml = tmp_path / "hparams.yaml"
    asks = "processes: 2\ntrainer:\n    devices: !ref <processes>\n"
    yaml.write_text(Path(TOY[1]).read_text() + asks)
    srun = (str(LAUNCHERS / "srun"), "--ntasks-per-node=2", python())
    for name, command, more, words in (
        ("torchrun", TORCHRUN, OWN, [GLOO]),
        ("own group", COMMAND, OWN, ["--trainer.devices=2"]),
        ("no group", COMMAND, {}, []),
        ("tasks of SLURM", (*srun, *COMMAND), {}, [GLOO, "--trainer.devices=2"]),
    ):
        folder = f"--output_folder={tmp_path / name}"
        words = [*words, "--number_of_epochs=1"]
        reports = ["--report=loss"] * ("torch.distributed.run" not in command)
        words += reports
        out = check_python(
            *command, RECIPE, str(yaml), *QUIET, folder, *words, cwd=tmp_path, **more
        )
        # That of the main process, after all that any of them prints.
        assert all(0 < float(out.splitlines()[-1]) < 10 for _ in reports)
        for rank in (0, 1):
            found, expected = (result(tmp_path / each, rank) for each in (name, "torchrun"))
            for brain in ("speechbrain", "brain_lightning"):
                assert same(found[brain], expected[brain])
                assert found[brain]["seen"] == expected[brain]["seen"]
                assert found[brain]["moved"]
        assert (tmp_path / name / "prepared.txt").read_text() == "rank 0\n" * 2
    one, other = (
        result(tmp_path / "no group", rank)["speechbrain"]["seen"] for rank in (0, 1)
    )
    # Of 24 examples.
    assert len({*one, *other}) == len(one) + len(other) == 24


@pytest.mark.parametrize(
    ("section", "asked"),
    [
        ("devices: !ref <processes>\n    num_nodes: 2", {"devices": 3, "num_nodes": 2}),
        ("devices: '2'\n    callbacks: [!new:not.there []]", {"devices": "2"}),
        ("accelerator: cpu\n    strategy: !new:not.there []", {"accelerator": "cpu"}),
        ("devices: !apply:os.cpu_count", {}),
        ("[devices]", {}),
    ],
)
def test_processes_are_as_many_as_the_file_says(
    tmp_path: Path, section: str, asked: dict[str, Any]
) -> None:
    yaml = tmp_path / "hparams.yaml"
    yaml.write_text(f"processes: 2\ntrainer:\n    {section}\n")
    assert processes_in_file([str(yaml), "--processes=3", "--device=cpu"]) == asked


@pytest.mark.parametrize(
    ("trainer", "on_cpu", "processes"),
    [
        ({}, True, 1), ({"devices": 3}, True, 3), ({"devices": "2"}, False, 2),
        ({"devices": "auto"}, True, 1), ({"devices": None}, True, 1),
        ({"devices": [1]}, False, 1),
        ({"devices": -1}, False, max(1, accelerator.device_count())),
    ],
)  # fmt: skip
def test_processes_are_as_many_as_devices(
    trainer: dict[str, Any], on_cpu: bool, processes: int
) -> None:
    assert processes_to_launch(trainer, on_cpu) == processes


def test_the_script_of_sbatch_starts_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NTASKS": "2", "JOB_NAME": "train", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert processes_to_launch({"devices": 2}, on_cpu=True) == 2


def test_torchruns_processes_start_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    assert processes_to_launch({"devices": 2}, on_cpu=True) == 1


@pytest.mark.parametrize("words", [[], ["--trainer.num_nodes=2"], ["--trainer.devices=2"]])
def test_tasks_of_slurm_are_the_processes_where_some_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """With a signal that requeues the job, and torchrun's variables for the script."""
    torchruns = {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node7", "MASTER_PORT": "15123",
    }  # fmt: skip
    for name in torchruns:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    slurms = {
        "PROCID": "3", "LOCALID": "1", "NODEID": "1", "NTASKS": "4", "NTASKS_PER_NODE": "2",
        "NNODES": "2", "NODELIST": "node[7,9]", "JOB_ID": "123", "JOB_NAME": "train",
        "STEP_ID": "0",
    }  # fmt: skip
    for name, value in slurms.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    ran: list[Any] = []
    monkeypatch.setattr(
        process_module, "process_group", lambda backend: nullcontext(ran.append(backend))
    )
    monkeypatch.setattr(run, "run_recipe", lambda *given: ran.append(given))
    assert main(["run", *TOY, "--device=cpu", *words]) == 0
    *groups, (_, _, trainer, _) = ran
    assert groups == (["gloo"] if words else [])
    assert [type(each) for each in trainer.get("plugins", [])] == [SLURMEnvironment] * len(
        words
    )
    found = {name: os.environ[name] for name in torchruns if name in os.environ}
    assert found == (torchruns if words else {})


def test_each_process_gets_the_whole_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    monkeypatch.setattr(process_module, "launch", lambda *given: launched.append(given) or 7)
    words = ["run", *TOY, "--device", "cpu", "--trainer.devices=2", "--debug-traceback"]
    given = [*words, "--distributed_backend", "mpi"]
    assert main(words) == main(given) == 7
    assert launched == [(2, [*words, GLOO]), (2, [*given, "--distributed_backend=mpi"])]


def test_a_mistake_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process_module, "launch", lambda *_: 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    nccl = "--distributed_backend=nccl"
    mistakes = (["nowhere.py"], [*TOY, "--trainer.max_step=3"], [TOY[0], "nowhere.yaml"])
    for words in (*mistakes, [*TOY, nccl]):
        assert main(["run", *words, "--trainer.devices=2"]) == 2
    *_, no_gpus = told = capsys.readouterr().err.splitlines()
    assert len(told) == 4
    assert "(processes: 2, GPUs: 1). Use --trainer.devices=1, or" in no_gpus


def test_lightning_starts_no_process_that_lacks_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "import speechbrain as sb\nsb.Brain().fit(range(1), [], trainer={'devices': 2})\n"
    assert main(["run", script(tmp_path, text)]) == 2
    assert "the other processes of Trainer(devices=2) would run the" in capsys.readouterr().err
