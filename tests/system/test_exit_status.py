"""What a shell sees of how a command ended: real processes, and real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from brain_lightning.cli.main import EXIT_STATUS, main
from brain_lightning.cli.processes import shell_status
from tests.support.processes import python, variables
from tests.support.scripts import RECIPES

RUN = ["run", str(RECIPES / "exits.py")]
ENDS = {"all is well": 0, "exits": 7, "crashes": 1, "is killed": 137, "has a mistake": 2}
TWO = ["--trainer.devices=2"]


def command(real: bool) -> list[str]:
    """As installed, in an interpreter of its own; or forked."""
    if real:
        return [str(Path(sys.executable).with_name("brain-lightning"))]
    return [python(), "-m", "brain_lightning"]


@pytest.mark.parametrize(
    ("how", "processes"),
    # Starting two takes its time.
    [*((how, []) for how in ENDS), ("exits", TWO), ("is killed", TWO), ("all is well", TWO)],
)
def test_a_run_ends_as_its_script(how: str, processes: list[str]) -> None:
    words = [*command(real=how == "exits" and not processes), *RUN, how, *processes]
    done = subprocess.run(
        words, env=variables(), capture_output=True, text=True, check=False, timeout=240
    )
    assert shell_status(done.returncode) == ENDS[how], done.stderr
    assert ("Traceback" in done.stderr) == (how == "crashes"), done.stderr
    said = "brain-lightning: error: run option progress='tqdm' is not supported"
    assert (said in done.stderr) == (how == "has a mistake")
    if processes and ENDS[how]:
        assert f"Rank 1 failed with exit status {ENDS[how]}." in done.stderr


@pytest.mark.parametrize("processes", [[], TWO], ids=["one", "two"])
@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
def test_signals(processes: list[str], signum: signal.Signals, status: int) -> None:
    """SIGTERM reaches one process, and a shell's Ctrl-C all of them; none is left behind."""
    # With ours: Python does not listen to Ctrl-C where it was started in the background.
    run = subprocess.Popen(
        [*command(real=False), *RUN, "waits", *processes],
        env=variables(), start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert run.stdout is not None
    # Some versions of torch print a note first.
    lines = (line.split() for line in iter(run.stdout.readline, ""))
    ready = (int(words[1]) for words in lines if words[:1] == ["ready"])
    waiting = list(islice(ready, 2 if processes else 1))
    run.send_signal(signum)
    if processes and signum is signal.SIGINT:
        # As a shell's, though forked processes are not in one group.
        for pid in waiting:
            os.kill(pid, signum)
    _, stderr = run.communicate(timeout=100)
    assert shell_status(run.returncode) == status, stderr
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)
    for pid in waiting:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("command", [[], ["run"], ["verify"], ["doctor"], ["convert"]])
def test_every_help_explains_them(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert EXIT_STATUS in capsys.readouterr().out
