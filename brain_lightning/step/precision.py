"""The device of a Brain, and the precision in which it computes."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from brain_lightning.compat.versions import accelerator
from brain_lightning.errors import RunOptionError
from brain_lightning.options.run_options import PRECISIONS

DTYPES = dict(zip(PRECISIONS, (torch.float32, torch.float16, torch.bfloat16), strict=True))


def infer_device() -> str:
    """This rank's accelerator where there is one, else the CPU.

    Returns:
        Its name (``speechbrain.utils.distributed.infer_device``).
    """
    if not accelerator.is_available():
        return "cpu"
    device = str(accelerator.current_accelerator())
    rank = os.environ.get("LOCAL_RANK")
    return device if rank is None else f"{device}:{rank}"


def device_type(device: str) -> str:
    """The kind of a device, which has to be there.

    Args:
        device: Its name.

    Returns:
        ``cpu``, ``cuda``…

    Raises:
        RunOptionError: There is no such device.
    """
    try:
        where = torch.device(device).type
    except RuntimeError as error:
        raise RunOptionError(
            f"device {device!r} is not one of cpu, cuda, cuda:0, cuda:1, mps…: {error}"
        ) from error
    if where == "cuda" and not torch.cuda.is_available():
        raise RunOptionError(f"device {device!r}: this torch sees no CUDA device; use cpu")
    return where


def gradient_scaler(device: str, precision: str) -> torch.GradScaler:
    """The scaler of a Brain's losses, on for fp16 alone.

    Args:
        device: The Brain's device.
        precision: The training precision.

    Returns:
        The scaler; where it is off, it changes nothing.
    """
    return torch.GradScaler(device, enabled=precision == "fp16")


def autocast(device: str, precision: str) -> AbstractContextManager[Any]:
    """The context in which a Brain computes.

    Args:
        device: The Brain's device.
        precision: fp32, fp16 or bf16.

    Returns:
        ``torch.autocast``; for fp32 a context without effect, so that a recipe's
        own autocast around it remains effective.

    Raises:
        RunOptionError: ``precision`` is none of them, or fp16 on the CPU.
    """
    if precision not in DTYPES:
        raise RunOptionError(
            f"precision {precision!r} is not one of {', '.join(DTYPES)}: "
            "use --precision=bf16 for mixed precision on any device"
        )
    where = device_type(device)
    if precision == "fp16" and where == "cpu":
        raise RunOptionError(
            "precision 'fp16' is not supported on the CPU: use --precision=bf16 or "
            "--eval_precision=bf16, or a GPU"
        )
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(where, DTYPES[precision])
