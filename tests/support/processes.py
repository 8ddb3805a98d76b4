"""Python processes: forked from one that has torch loaded, or started as a shell does.

``python()`` names a program that takes the place of the interpreter, with the same words and
exit status; see ``fork_server.py``. It is started at the first call. Wherever a process is the
interpreter's own ``sys.executable``, it is a real one.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from .fork_server import CLIENT

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
# Programs of which others start processes: torchrun and srun stand in for a cluster.
LAUNCHERS = Path(__file__).parent / "launchers"


def python() -> str:
    """The program that has a process forked, and ends as that does."""
    return str(programs() / "python")


def at_end_of_process(call: Callable[[], object]) -> None:
    """Calls it at the end of this process, and not of its forks that end as Python does."""
    owner = os.getpid()
    atexit.register(lambda: call() if os.getpid() == owner else None)


def temporary_folder(prefix: str) -> str:
    folder = tempfile.mkdtemp(prefix=prefix)
    at_end_of_process(lambda: shutil.rmtree(folder))
    return folder


@functools.cache
def programs() -> Path:
    """A folder for ``PATH``: ``python`` and ``brain-lightning`` in forked processes."""
    # Short, for the address of a socket has a limit.
    folder = temporary_folder("fork-")
    address, log = os.path.join(folder, "socket"), os.path.join(folder, "log")
    client = CLIENT.format(
        executable=sys.executable, scripts=str(Path(sys.executable).parent), address=address,
        log=log,
    )  # fmt: skip
    bin_folder = Path(folder, "bin")
    bin_folder.mkdir()
    for name in ("python", "brain-lightning"):
        (bin_folder / name).write_text(client)
        (bin_folder / name).chmod(0o755)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        open(log, "w") as out,
    ):
        listener.bind(address)
        listener.listen(64)
        arguments = (listener.fileno(), str(bin_folder / "python"))
        code = f"from tests.support.fork_server import main; main{arguments}"
        server = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT, env=variables(PYTORCH_NVML_BASED_CUDA_CHECK="1"), start_new_session=True,
            pass_fds=[listener.fileno()], stdin=subprocess.PIPE, stdout=out, stderr=out,
        )  # fmt: skip

    at_end_of_process(server.communicate)
    return bin_folder


@functools.cache
def site() -> Path:
    """A folder that makes torchaudio importable in real processes too: see environment.py."""
    folder = temporary_folder("site-")
    if not hasattr(sys.modules["torchaudio._extension"], "__file__"):
        Path(folder, "sitecustomize.py").write_text(
            "import sys, types\n"
            "stub = types.ModuleType('torchaudio._extension')\n"
            "stub._IS_TORCHAUDIO_EXT_AVAILABLE = stub._IS_ALIGN_AVAILABLE = False\n"
            "stub.fail_if_no_align = lambda function: function\n"
            "sys.modules['torchaudio._extension'] = stub\n"
        )
    return Path(folder)


def variables(**more: str) -> dict[str, str]:
    """The environment of a process, where tests and SpeechBrain can be imported."""
    path = [str(ROOT), str(site()), *filter(None, [os.environ.get("PYTHONPATH")])]
    paths = {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **paths, **more}


def run_python(
    *words: str, cwd: Path | None = None, real: bool = False, **more: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python with these words; it ends in any case, for a run that hangs is a failure.

    Args:
        words: ``-m``, ``-c`` or a script, and their arguments.
        cwd: Where to run; the repository if it is None.
        real: A process of the interpreter's own, which imports everything itself.
        more: Variables of its environment.
    """
    return subprocess.run(
        [sys.executable if real else python(), *words],
        cwd=cwd or ROOT, env=variables(**more), capture_output=True, text=True, check=False,
        timeout=240,
    )  # fmt: skip


def check_python(*words: str, cwd: Path | None = None, real: bool = False, **more: str) -> str:
    """The same of what must end with status 0; returns what it printed."""
    done = run_python(*words, cwd=cwd, real=real, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
