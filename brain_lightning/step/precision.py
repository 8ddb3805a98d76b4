"""The device of a Brain and the precision of its computations."""

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
    """Returns the accelerator of this rank, or the CPU if there is no accelerator.

    Returns:
        Name of the device (``speechbrain.utils.distributed.infer_device``).
    """
    if not accelerator.is_available():
        return "cpu"
    device = str(accelerator.current_accelerator())
    rank = os.environ.get("LOCAL_RANK")
    return device if rank is None else f"{device}:{rank}"


def device_type(device: str) -> str:
    """Returns the type of a device, after checking that the device exists.

    Args:
        device: Name of the device.

    Returns:
        ``cpu``, ``cuda``, ...

    Raises:
        RunOptionError: There is no such device.
    """
    try:
        where = torch.device(device).type
    except RuntimeError as error:
        raise RunOptionError(
            f"device {device!r} is not valid. Use cpu, cuda, cuda:0, cuda:1 or mps. torch "
            f"reports: {error}"
        ) from error
    if where == "cuda" and not torch.cuda.is_available():
        raise RunOptionError(
            f"device {device!r} is not available: torch finds no CUDA device. Use "
            "--device=cpu."
        )
    return where


def gradient_scaler(device: str, precision: str) -> torch.GradScaler:
    """Returns the gradient scaler of a Brain, which is enabled only for fp16.

    Args:
        device: Device of the Brain.
        precision: Precision of training.

    Returns:
        The scaler. If it is disabled, it changes nothing.
    """
    return torch.GradScaler(device, enabled=precision == "fp16")


def autocast(device: str, precision: str) -> AbstractContextManager[Any]:
    """Returns the context in which a Brain computes.

    Args:
        device: Device of the Brain.
        precision: fp32, fp16 or bf16.

    Returns:
        ``torch.autocast``. For fp32, a context without effect, so that an autocast context of
        the recipe around it stays in effect.

    Raises:
        RunOptionError: ``precision`` is not one of the three, or it is fp16 on the CPU.
    """
    if precision not in DTYPES:
        raise RunOptionError(
            f"precision={precision!r} is not supported. Use one of {', '.join(DTYPES)}. bf16 "
            "is mixed precision on any device."
        )
    where = device_type(device)
    if precision == "fp16" and where == "cpu":
        raise RunOptionError(
            "precision='fp16' is not supported on the CPU. Use --precision=bf16 (or "
            "--eval_precision=bf16), or a GPU."
        )
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(where, DTYPES[precision])
