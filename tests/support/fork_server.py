"""A process that has imported torch once and forks a Python process for each request.

``processes.py`` starts it. A request comes from a client, a program that stands in for the
interpreter: it passes its words, folder, environment and standard streams, waits, forwards
signals, and ends as the forked process did.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The client, to be completed with what the server knows. It runs without site-packages.
CLIENT = """\
#!{executable} -IS
import json, os, signal, socket, sys

name = os.path.basename(sys.argv[0])
words = sys.argv[1:] if name == "python" else [os.path.join({scripts!r}, name), *sys.argv[1:]]
request = {{"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}}
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
child = int(server.recv(99) or sys.exit("the fork server has ended: {log}"))
for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(signum, lambda signum, _: os.kill(child, signum))
status = int(server.recv(99) or -signal.SIGKILL)
if status < 0:
    if status != -signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""
# What takes long to import: of the tests, the examples, and of torchrun.
PRELOADED = (
    "tests.support.environment", "lightning.pytorch.loggers", "torch.distributed.run",
    "brain_lightning.module.to_lightning", "brain_lightning.brain.brain",
    "brain_lightning.cli.main", "sklearn.datasets",
)  # fmt: skip


def main(listener: int, executable: str) -> None:
    """Serves until standard input is closed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Another file for the children, which have `python` run by a client too.
    sys.executable = executable
    first, before = list(sys.path), list(warnings.filters)
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()
    request, streams = Server(socket.socket(fileno=listener)).serve()
    adopt(request, streams, first, before)
    end(status_of(request["words"]))


class Server:
    """Forks, and tells each client how its process ended."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.clients: dict[int, socket.socket] = {}
        self.selector = selectors.DefaultSelector()
        self.ended, self.signalled = os.pipe()
        for end in (self.ended, self.signalled):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.signalled, warn_on_full_buffer=False)
        for source in (listener, self.ended, sys.stdin.fileno()):
            self.selector.register(source, selectors.EVENT_READ)

    def serve(self) -> tuple[dict[str, Any], list[int]]:
        """Returns in a fork alone: what was requested, and the three streams."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    request = self._accept()
                    if request is not None:
                        return request
                elif key.fileobj == self.ended:
                    os.read(self.ended, 4096)
                    self._reap()
                elif key.fileobj == sys.stdin.fileno():
                    self._end()
                elif key.fileobj in self.clients.values():
                    # The client is gone, which was killed: nobody waits for the process.
                    pid = next(p for p, c in self.clients.items() if c is key.fileobj)
                    os.kill(pid, signal.SIGKILL)
                    self.selector.unregister(key.fileobj)

    def _accept(self) -> tuple[dict[str, Any], list[int]] | None:
        client, _ = self.listener.accept()
        message, streams, *_ = socket.recv_fds(client, 1 << 20, 3)
        if not message:
            client.close()
            return None
        pid = os.fork()
        if pid == 0:
            client.close()
            self._forget()
            return json.loads(message), streams
        for stream in streams:
            os.close(stream)
        self.clients[pid] = client
        client.send(str(pid).encode())
        self.selector.register(client, selectors.EVENT_READ)
        return None

    def _forget(self) -> None:
        """In a fork: nothing of the server's is left open."""
        # From Python 3.12 on asyncio has done so already.
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.selector.close()
        self.listener.close()
        for client in self.clients.values():
            client.close()
        for end in (self.ended, self.signalled):
            os.close(end)

    def _reap(self) -> None:
        while self.clients:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            client = self.clients.pop(pid)
            if client.fileno() in self.selector.get_map():
                self.selector.unregister(client)
                client.send(str(os.waitstatus_to_exitcode(status)).encode())
            client.close()

    def _end(self) -> None:
        for pid in self.clients:
            os.kill(pid, signal.SIGKILL)
        for pid in self.clients:
            os.waitpid(pid, 0)
        os._exit(0)


def adopt(
    request: dict[str, Any],
    streams: Sequence[int],
    path: list[str],
    filters: list[Any],
) -> None:
    """Gives a fork what a process is started with."""
    # Temporary folders of the server are removed by the server.
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    mine = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = ["", *given, *(entry for entry in path if entry and entry not in mine)]
    words = request["words"]
    while words[0] in ("-W", "-u"):
        if words.pop(0) == "-W":
            sys.warnoptions.append(words.pop(0))
        else:
            sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    # Below those of the libraries, which are imported later where nothing is preloaded.
    libraries = warnings.filters[: len(warnings.filters) - len(filters)]
    warnings.filters[:] = filters  # type: ignore[index]
    warnings._processoptions(sys.warnoptions)  # type: ignore[attr-defined]
    warnings.filters[:0] = libraries  # type: ignore[index]
    random.seed()
    sys.modules["numpy"].random.seed()


def status_of(words: list[str]) -> int:
    """Runs a program, and reports what it raises as Python does; a signal is negative."""
    try:
        run_as_main(words)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:  # noqa: BLE001  reported
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def end(status: int) -> None:
    """Ends the process as the interpreter does, but for its memory: that takes a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


def run_as_main(words: list[str]) -> None:
    """Runs a script, ``-m`` or ``-c`` as ``__main__``; what it raises is the caller's."""
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = sys.modules["builtins"]
    sys.modules["__main__"] = main
    kind, *rest = words
    if kind == "-m":
        sys.path[0] = os.getcwd()
        sys.argv[:] = rest
        runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
        return
    sys.argv[:] = words
    if kind == "-c":
        sys.argv[:] = ["-c", *rest[1:]]
        code = compile(rest[0], "<string>", "exec")
    else:
        assert not kind.startswith("-"), f"{kind}: an option that no test has had yet"
        path = Path(kind).absolute()
        sys.path[0] = str(path.resolve().parent)
        main.__dict__["__file__"] = str(path)
        code = compile(path.read_bytes(), str(path), "exec")
    exec(code, main.__dict__)  # noqa: S102
