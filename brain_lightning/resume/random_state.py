"""The state of every random number generator of a process, as plain values."""

from __future__ import annotations

import array
import random
from typing import Any, cast

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Returns the random states of torch on all devices, of numpy and of Python.

    Returns:
        Bytes and numbers, which can be loaded without running code.
    """
    _, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
    version, internal, gauss = random.getstate()
    return {
        "torch": to_bytes(torch.get_rng_state()),
        "cuda": [to_bytes(state) for state in _cuda_states()],
        "numpy": [keys.tobytes(), *rest],
        "python": [version, array.array("Q", internal).tobytes(), gauss],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restores the state of every generator.

    Args:
        state: Result of ``random_state``.
    """
    torch.set_rng_state(to_tensor(state["torch"]))
    for device, cuda in zip(range(len(_cuda_states())), state["cuda"], strict=False):
        torch.cuda.set_rng_state(to_tensor(cuda), device)
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", np.frombuffer(keys, np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(array.array("Q", internal)), gauss))


def _cuda_states() -> list[torch.Tensor]:
    # Reading the state of a CUDA device initializes CUDA, which takes memory on the device.
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]


def to_bytes(state: torch.Tensor) -> bytes:
    """Converts the state of a torch generator to bytes.

    Args:
        state: Result of ``get_rng_state`` or ``Generator.get_state``.
    """
    return bytes(state.numpy().data)


def to_tensor(state: bytes) -> torch.Tensor:
    """Converts bytes to the state of a torch generator.

    Args:
        state: Result of ``to_bytes``.
    """
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
