"""A forked process ends, and says, what one of the interpreter's own does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.processes import python, run_python, variables

PROGRAMS = {
    "nothing": "",
    "a status": "raise SystemExit(7)",
    "a message": "raise SystemExit('no')",
    "an error": "1 / 0",
    "Ctrl-C": "raise KeyboardInterrupt",
    "a signal": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "without an end": "import os; print('lost'); os._exit(3)",
    "words": "import sys; print(sys.argv, __name__, sys.path[0] == '')",
    "at its end": (
        "import atexit, threading; atexit.register(print, 'atexit')\n"
        "threading.Timer(0.01, print, ['thread']).start(); print('main')"
    ),
    "a warning": "import warnings; warnings.warn('first'); print('warned')",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_fork_is_a_process_as_any(program: str) -> None:
    fork, real = (
        run_python("-W", "error", "-c", program, "word", real=real) for real in (False, True)
    )
    assert fork.returncode == real.returncode
    assert fork.stdout == real.stdout
    # Where an error has come from is longer.
    assert fork.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


def test_a_script_and_a_module_are_main(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("NUMBER = 3\n")
    (tmp_path / "train.py").write_text(
        "import os, pickle, sys, beside\n"
        "class Mine: pass\n"
        "print(type(pickle.loads(pickle.dumps(Mine()))).__module__, __spec__, sys.argv[1:],\n"
        "      __file__, beside.NUMBER, os.environ['MINE'], os.getcwd())\n"
    )
    for words in (["train.py", "a"], ["-m", "beside"], [str(tmp_path / "train.py"), "b"]):
        fork, real = (
            run_python(*words, cwd=tmp_path, real=real, MINE="yes") for real in (False, True)
        )
        assert (fork.returncode, fork.stdout) == (0, real.stdout)


def test_a_fork_ends_with_what_stands_in_for_it(tmp_path: Path) -> None:
    code = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    with subprocess.Popen(
        [python(), "-c", code], env=variables(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
        # Closed where the last process has ended that could write to it.
        assert process.stdout.read() == ""
    assert process.returncode == -9
    assert pid != process.pid
