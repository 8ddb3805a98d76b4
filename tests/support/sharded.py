"""A module in shards in this process, beside the same module as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import Module

from brain_lightning import Brain
from brain_lightning.fsdp2.shard import shard_modules
from brain_lightning.fsdp2.sharding import Sharding
from brain_lightning.fsdp2.tensors import is_shard, whole


@contextmanager
def group_of_one() -> Iterator[None]:
    """A process group of this process alone, in which shards are gathered and released."""
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextmanager
def fake_group_of_two() -> Iterator[None]:
    """A process group of this process and another, with which nothing is communicated.

    A thread of gloo may hold a tensor for a moment after it is sent; here nothing does.
    """
    # It registers the backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def brain_of(**modules: Module) -> Any:
    return Brain(modules, run_opts={"device": "cpu"})


def shard(module: Module, **sharding: Any) -> Any:
    brain = brain_of(model=module)
    shard_modules(brain, Sharding(**sharding))
    return brain.modules.model


def gradients(module: Module) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {name: whole(gradient) for name, gradient in found.items()}


def assert_same_gradients(
    make: Callable[[], Module], use: Callable[[Any, Tensor], Any], **sharding: Any
) -> None:
    """Uses a module twice, plain and in shards: all parameters have the same gradients.

    Args:
        make: Makes the module.
        use: Gets it and a batch, and calls ``backward``.
        sharding: Of ``Sharding``.
    """
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    sharded = shard(make(), **sharding)
    for batch in torch.randn(2, 5, 5):
        use(plain, batch.clone())
        use(sharded, batch.clone())
        assert all(is_shard(p) for p in sharded.parameters())
        expected, found = gradients(plain), gradients(sharded)
        assert expected.keys() == found.keys() == dict(plain.named_parameters()).keys()
        for name, gradient in expected.items():
            assert torch.allclose(gradient, found[name]), name
