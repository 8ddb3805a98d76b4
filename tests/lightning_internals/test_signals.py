"""Signal handlers: disabled in the Trainer of ``brain.fit``; requeued SLURM jobs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch.utils.data import DataLoader

from brain_lightning import Checkpointer, to_lightning
from tests.support.brains import (
    Regression,
    all_equal,
    dataset,
    loader,
    make,
    trainer_with,
    weights,
)


def test_lightning_handles_no_signal_before_training_starts() -> None:
    found = []

    def epochs() -> Iterator[int]:
        # Lightning has registered its handlers, but has not called a hook yet.
        found.append(signal.getsignal(signal.SIGTERM))
        yield 1

    make().fit(epochs(), loader())
    assert found == [signal.SIG_DFL]


@pytest.mark.parametrize("hook", ["on_stage_start", "on_stage_end"])
def test_a_handler_that_a_hook_registers_stays(hook: str) -> None:
    """A handler of a hook stays, as in SpeechBrain; Lightning would remove it."""

    def handler(*_: Any) -> None:
        """Nothing: that it is there is enough."""

    def register(self: Any, *_: Any) -> None:
        signal.signal(signal.SIGUSR2, handler)

    brain = make(type("Registers", (Regression,), {hook: register}))
    before = signal.getsignal(signal.SIGUSR2)
    try:
        brain.fit(range(1), loader())
        assert signal.getsignal(signal.SIGUSR2) is handler
    finally:
        signal.signal(signal.SIGUSR2, before)


# ------------------------------------------------------------------------------ SLURM jobs

JOB = {
    "SLURM_NTASKS": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
}  # fmt: skip
FAILS = "exit 3"
# SLURM ends a job when it requeues the job.
REQUEUES = "kill -TERM $PPID"


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Creates a fake scontrol command, which writes its arguments to the returned file."""
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)

    def make_command(rest: str) -> Path:
        asked = tmp_path / "asked"
        command = tmp_path / "scontrol"
        command.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n{rest}\n', encoding="utf-8")
        command.chmod(0o755)
        return asked

    return make_command


class Told(Regression):
    """Receives a signal in the middle of batch 7, or in the validation after it."""

    def compute_forward(self, batch: Any, stage: Any) -> Any:
        signum = getattr(self.hparams, stage.name, None)
        if signum and self.optimizer_step == (6 if stage.name == "TRAIN" else 10):
            os.kill(os.getpid(), signum)
        noise = torch.rand(len(batch[0]), 1) if stage.name == "TRAIN" else 1
        return self.modules.model(batch[0] * noise)


def train(job: str, saver: Any = None, told: dict[str, Any] | None = None) -> Any:
    brain = make(Told, hparams=told, checkpointer=saver)
    if saver is not None:
        saver.add_recoverables({"model": brain.modules.model})
    data = DataLoader(dataset(), 4, shuffle=True)
    if job == "fit":
        brain.fit(range(3), data, data)
    else:
        asked = {
            "SIGUSR2": {"requeue_signal": signal.SIGUSR2},
            "none": {"auto_requeue": False},
        }
        trainer = trainer_with(plugins=[SLURMEnvironment(**asked.get(job, {}))], max_epochs=3)
        trainer.fit(to_lightning(brain), data, data)
    learned = weights(brain), brain.optimizer_step
    # It evaluates the trained weights, not the weights that the job saved.
    brain.evaluate(data)
    return learned


@pytest.mark.parametrize(
    ("job", "told", "has_saver"),
    [
        ("Trainer", {"TRAIN": signal.SIGUSR1}, False),
        ("SIGUSR2", {"VALID": signal.SIGUSR2}, False),
        ("fit", {"TRAIN": signal.SIGUSR1}, False),
        ("fit", {"TRAIN": signal.SIGUSR1}, True),
    ],
)
def test_slurm_requeues_a_job_which_resumes_exactly(
    tmp_path: Path,
    scontrol: Callable[[str], Path],
    job: str,
    told: dict[str, Any],
    has_saver: bool,
) -> None:
    asked = scontrol(REQUEUES)

    def saver(name: str) -> Any:
        return Checkpointer(tmp_path / name) if has_saver else None

    expected, updates = train(job, saver("whole"))
    with pytest.raises(SystemExit) as end:
        train(job, saver("save"), told)
    assert end.value.code == 143
    assert asked.read_text() == "requeue 7\n"
    # A directory is found by itself, and may be newer when a job is ended otherwise.
    assert Path("hpc_ckpt_1.ckpt").exists() is not has_saver
    rest, done = train(job, saver("save"))
    assert (done, all_equal(expected, rest)) == (updates, True)


def test_a_job_that_is_not_requeued_goes_on(
    scontrol: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    asked = scontrol(FAILS)
    expected, updates = train("Trainer", told={"TRAIN": signal.SIGUSR1})
    assert updates == 15
    assert asked.read_text() == "requeue 7\n"
    assert "The job is not requeued, and the run continues" in caplog.text
    Path("hpc_ckpt_1.ckpt").unlink()
    assert all_equal(expected, train("Trainer")[0])


def test_without_requeuing_its_signal_is_as_ever(scontrol: Callable[[str], Path]) -> None:
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    try:
        assert train("none", told={"TRAIN": signal.SIGUSR1})[1] == 15
        # Also not if the user handles the signal.
        assert train("Trainer", told={"TRAIN": signal.SIGUSR1})[1] == 15
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [1, 1]
