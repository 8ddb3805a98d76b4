"""The memory that something takes at its peak, and how long it takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch


@dataclass
class Usage:
    """What something took; known when it is over.

    Attributes:
        peak: Bytes at the highest: on a GPU what tensors held there, on the CPU what the
            process held, all that it held before included.
        seconds: From its beginning until the device was done with it.
    """

    peak: int = 0
    seconds: float = 0.0


@contextmanager
def measured_usage(device: str | torch.device) -> Iterator[Usage]:
    """Measures what runs within.

    Args:
        device: Where tensors are.

    Yields:
        What it took, also where it fails.
    """
    where, usage = torch.device(device), Usage()
    _reset_peak(where)
    start = time.perf_counter()
    try:
        yield usage
        _wait(where)
    finally:
        usage.seconds = time.perf_counter() - start
        usage.peak = _peak(where)


def held(device: str | torch.device) -> int:
    """Bytes that are taken now, of what ``measured_usage`` measures.

    Args:
        device: Where tensors are.

    Returns:
        0 where nothing says so.
    """
    where = torch.device(device)
    if where.type == "cuda":
        return torch.cuda.memory_allocated(where)
    return _of_process("VmRSS") or 0


def capacity(device: str | torch.device) -> int | None:
    """Bytes that a device has.

    Args:
        device: The device.

    Returns:
        None for the CPU, whose limit may be that of a container.
    """
    where = torch.device(device)
    if where.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(where).total_memory)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Linux alone can (proc(5), clear_refs); not everywhere may it be written.
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = _of_process("VmHWM")
    if peak is not None:
        return peak
    # Windows has none.
    import resource

    # Of the whole life of the process; in bytes on macOS, else in KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _of_process(name: str) -> int | None:
    """Bytes of this process by their name in proc(5); None where there is no such file."""
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
