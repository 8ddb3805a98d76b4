"""Counts what processes say to each other."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """The collectives that the process group is given while it is entered, whoever asks.

    Each is an operator of ``c10d``. Those within a backward pass are DDP's, of gradients.

    Attributes:
        count: All others.
        gradients: Those within a backward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = self.gradients = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            if torch._C._current_graph_task_id() == -1:
                self.count += 1
            else:
                self.gradients += 1
        return func(*args, **(kwargs or {}))
