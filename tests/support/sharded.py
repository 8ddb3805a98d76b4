"""A module in shards in this process, beside the same module as it is."""

from __future__ import annotations

from collections import defaultdict
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


def wholes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors, of shards the whole: a collective for all that are of one type.

    Args:
        tensors: Where there are shards, all processes call this.
    """
    by_type: dict[Any, dict[str, Any]] = defaultdict(dict)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        of: Any = tensor.detach()
        if not is_shard(of) or of.device_mesh.ndim > 1 or not of.placements[0].is_shard(dim=0):
            found[name] = whole(of).clone()
        else:
            by_type[of.dtype][name] = of
    for shards in by_type.values():
        found |= _gathered(shards)
    return {name: found[name] for name in tensors}


def _gathered(shards: dict[str, Any]) -> dict[str, Tensor]:
    """Wholes of tensors of one type, of which ``torch.chunk`` made the parts."""
    size = distributed.get_world_size()
    padded = [_padded(shard, -(-len(shard) // size)).reshape(-1) for shard in shards.values()]
    flat = torch.cat(padded)
    parts = [torch.empty_like(flat) for _ in range(size)]
    distributed.all_gather(parts, flat)
    columns = torch.stack(parts).split([len(each) for each in padded], dim=1)
    return {
        name: column.reshape(-1, *shard.shape[1:])[: len(shard)].clone()
        for (name, shard), column in zip(shards.items(), columns, strict=True)
    }


def _padded(shard: Any, length: int) -> Tensor:
    local = shard.to_local()
    padded = local.new_zeros(length, *local.shape[1:])
    padded[: len(local)] = local
    return padded


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
