"""Measures the peak memory and the duration of a block of code."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch


@dataclass
class Usage:
    """Measured memory and duration. The values are set when the block has ended.

    Attributes:
        peak: Peak memory in bytes, including memory that was in use before. On a GPU this is
            the memory of tensors, on the CPU the memory of the process.
        seconds: Time from the start until the device has finished.
    """

    peak: int = 0
    seconds: float = 0.0


@contextmanager
def measured_usage(device: str | torch.device) -> Iterator[Usage]:
    """Context manager that measures the code within.

    Args:
        device: Device of the tensors.

    Yields:
        The usage, whose values are also set if the code raises.
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


def current_memory(device: str | torch.device) -> int:
    """Returns the memory that is in use now, as ``measured_usage`` measures it.

    Args:
        device: Device of the tensors.

    Returns:
        Number of bytes. 0 if it is not known.
    """
    where = torch.device(device)
    if where.type == "cuda":
        return torch.cuda.memory_allocated(where)
    return _of_process("VmRSS") or 0


def capacity(device: str | torch.device) -> int | None:
    """Returns the total memory of a device.

    Args:
        device: The device.

    Returns:
        Number of bytes. None for the CPU, because a container may limit its memory.
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
    # Only Linux has clear_refs (proc(5)), and some systems do not allow writing to it.
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = _of_process("VmHWM")
    if peak is not None:
        return peak
    # Windows does not have this module.
    import resource

    # The peak since the start of the process, in bytes on macOS and in KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _of_process(name: str) -> int | None:
    """Returns a size of this process from proc(5) in bytes, or None if it is not available."""
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
