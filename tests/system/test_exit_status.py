"""What a shell sees of how a command ended: real processes, and real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from brain_lightning.cli.exit_status import EXPLANATION, of_process
from brain_lightning.cli.main import main

RECIPE = str(Path(__file__).parents[1] / "support" / "recipes" / "exits.py")
RUN = [sys.executable, "-m", "brain_lightning", "run", RECIPE]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
ENDS = {"all is well": 0, "exits": 7, "crashes": 1, "is killed": 137, "has a mistake": 2}
TWO = ["--trainer.devices=2"]


@pytest.mark.parametrize(
    ("how", "processes"),
    # Starting two takes its time.
    [*((how, []) for how in ENDS), ("exits", TWO), ("is killed", TWO), ("all is well", TWO)],
)
def test_a_run_ends_as_its_script(how: str, processes: list[str]) -> None:
    done = subprocess.run(
        [*RUN, how, *processes], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert of_process(done.returncode) == ENDS[how], done.stderr
    assert ("Traceback" in done.stderr) == (how == "crashes"), done.stderr
    said = "brain-lightning: error: run option progress='tqdm' is not one of"
    assert (said in done.stderr) == (how == "has a mistake")
    if processes and ENDS[how]:
        assert f"Rank 1 has failed, with status {ENDS[how]}." in done.stderr


@pytest.mark.parametrize("processes", [[], TWO], ids=["one", "two"])
@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
def test_signals(processes: list[str], signum: signal.Signals, status: int) -> None:
    """SIGTERM reaches one process, and a shell's Ctrl-C all of them; none is left behind."""
    # With ours: Python does not listen to Ctrl-C where it was started in the background.
    run = subprocess.Popen(
        [*RUN, "waits", *processes],
        env=ENVIRONMENT, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert run.stdout is not None
    for _ in range(2 if processes else 1):
        assert run.stdout.readline() == "ready\n"
    if signum is signal.SIGINT:
        os.killpg(run.pid, signum)
    else:
        run.send_signal(signum)
    _, stderr = run.communicate(timeout=100)
    assert of_process(run.returncode) == status, stderr
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)


@pytest.mark.parametrize("command", [[], ["run"], ["verify"], ["doctor"], ["convert"]])
def test_every_help_explains_them(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert EXPLANATION in capsys.readouterr().out
