"""The states of a loader's samplers, which change from one pass to the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from .plain_values import State, plain_values
from .random_state import to_bytes, to_tensor
from .worker_states import is_stateful


class SamplerStates:
    """The states of a loader's samplers before a pass.

    The state of a sampler is its ``state_dict``. If it has none, its state is its generator
    and the attributes that have changed since the first pass. For example, SpeechBrain's
    DynamicBatchSampler shuffles its batches after each pass.

    Args:
        loader: The loader, before its first pass. None has no samplers.

    Attributes:
        loader: The loader.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._first = [dict(_attributes(sampler)) for sampler in _samplers(loader)]

    def now(self) -> list[State]:
        """Returns the current states. This is cheap, because attributes are not copied."""
        pairs = zip(_samplers(self.loader), self._first, strict=True)
        return [self._now(sampler, first) for sampler, first in pairs]

    def _now(self, sampler: Any, first: State) -> State:
        if is_stateful(sampler) and not isinstance(sampler, DataLoader):
            return {"state": sampler.state_dict()}
        own, generator = _attributes(sampler), getattr(sampler, "generator", None)
        state: State = {"changed": {n: v for n, v in own.items() if first.get(n) is not v}}
        if isinstance(generator, torch.Generator):
            state["generator"] = to_bytes(generator.get_state())
        return state

    def resume(self, states: list[State]) -> None:
        """Restores the samplers.

        Args:
            states: Result of ``plain_states``.
        """
        for sampler, state in zip(_samplers(self.loader), states, strict=False):
            if "state" in state:
                sampler.load_state_dict(state["state"])
                continue
            if "generator" in state and getattr(sampler, "generator", None) is not None:
                sampler.generator.set_state(to_tensor(state["generator"]))
            _attributes(sampler).update(state["changed"])


def plain_states(states: list[State]) -> list[State]:
    """Copies the parts of states that can be saved.

    Args:
        states: Result of ``SamplerStates.now``.
    """
    return [
        {**state, "changed": plain_values(state["changed"])} if "changed" in state else state
        for state in states
    ]


def _attributes(sampler: Any) -> State:
    """Returns the attributes of a sampler; empty for torch's, which change only generators."""
    if type(sampler).__module__.startswith("torch.") or isinstance(sampler, DataLoader):
        return {}
    return getattr(sampler, "__dict__", {})


def _samplers(loader: Any) -> Iterator[Any]:
    """Yields the loader and its nested samplers, from the outside in."""
    while loader is not None:
        yield loader
        # Compared with None, because bool() of an endless sampler would call __len__.
        batches = getattr(loader, "batch_sampler", None)
        loader = getattr(loader, "sampler", None) if batches is None else batches
