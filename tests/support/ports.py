"""Ports of this machine."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A port that no process listens on; the system gives another one to who asks next."""
    with socket.socket() as asking:
        asking.bind(("127.0.0.1", 0))
        return int(asking.getsockname()[1])
