"""Validation that is sharded over ranks (``--shard_eval``), and training on unequal data.

Together, the ranks evaluate each batch that a single process would evaluate, exactly once.
Losses and rates equal the results of a single process.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from brain_lightning.data.dataloaders import twin
from brain_lightning.distributed.communication import gather, rank, world_size
from brain_lightning.errors import UnequalDataError
from brain_lightning.protocol import BrainProtocol, hparams_of, is_statistics
from brain_lightning.resume.epoch_statistics import OWN

logger = logging.getLogger(__name__)

# Name of a statistics object, and name of its attribute.
Key = tuple[str, str]

# Types of the attributes in which statistics are counted.
COUNTED = (list, int, float, Tensor)
# A tensor with this many elements or more is not considered a counter.
LARGE = 100


def fetches_collectively(length: float | None) -> bool:
    """Whether ranks must check collectively before each batch that all have a next batch.

    Args:
        length: Number of training batches of this rank, or None if it is unknown.

    Returns:
        True if the length of any rank is unknown.

    Raises:
        UnequalDataError: One rank has more batches than another. It would hang when it waits
            for the gradients of the other rank.
    """
    lengths = gather(length)
    if None in lengths:
        return world_size() > 1
    if len(set(lengths)) > 1:
        raise UnequalDataError(
            f"the ranks have {', '.join(map(str, lengths))} training batches, in order of "
            "rank, but need equal numbers. Set drop_last=True to leave batches out, use a "
            "DistributedSampler to repeat examples, or end the epoch early with "
            f"Trainer(limit_train_batches={min(lengths)})"
        )
    return False


def shard_length(batches: float) -> float:
    """Returns the number of batches in the shard of this rank.

    Args:
        batches: Number of batches of all ranks; may be infinite.
    """
    return batches if math.isinf(batches) else max(0, -((rank() - batches) // world_size()))


class Shard:
    """The shard of a loader or sampler for this rank: every ``world_size``-th item.

    Args:
        loader: Iterable that yields the same items on every rank.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return int(shard_length(len(self._loader)))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        loader = self._loader
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            # A copy of the loader that does not load the batches of other ranks.
            name = "sampler" if loader.batch_sampler is None else "batch_sampler"
            shard = {name: Shard(getattr(loader, name))}
            return iter(twin(loader, persistent_workers=False, **shard))
        return itertools.islice(loader, rank(), None, world_size())


def synchronize_buffers(brain: BrainProtocol) -> None:
    """Broadcasts the buffers of rank 0, as DDP does in the first evaluation batch.

    DDP broadcasts in its forward pass. A rank without a batch would not take part in it.

    Args:
        brain: The Brain at the start of a sharded stage.
    """
    for module in brain.modules.values():
        if isinstance(module, DistributedDataParallel) and module.broadcast_buffers:
            for buffer in module.modules_buffers:
                torch.distributed.broadcast(buffer, src=0)
            module.require_forward_param_sync = False


def average_over_ranks(average: float, batches: int) -> float:
    """Returns the average loss over the batches of all ranks.

    Args:
        average: Average loss over the batches of this rank.
        batches: Number of batches of this rank.
    """
    found = gather((average, batches))
    total = sum(count for _, count in found)
    return sum(mean * count for mean, count in found) / total if total else 0.0


class ShardedStatistics:
    """The statistics of a sharded stage, merged over ranks at its end.

    Statistics are objects with the interface of SpeechBrain's ``MetricStats``, as attributes
    of the Brain or in ``hparams``. Their lists are merged in the order in which a single
    process would append. Numbers that have changed are summed over ranks.

    Args:
        brain: The Brain, after ``on_stage_start``.
    """

    def __init__(self, brain: BrainProtocol) -> None:
        self._brain = brain
        self._names = self._objects().keys()
        # Numbers and lengths of lists, at the start and after each batch.
        self._seen = [self._sizes()]
        self._others = self._sizes_of_others()

    def after_batch(self) -> None:
        """Records the sizes of the statistics after a batch."""
        self._seen.append(self._sizes())

    def merge(self) -> None:
        """Merges the statistics of all ranks, on every rank."""
        self._warn_of_others()
        own = {key: self._gained(key, value) for key, value in self._values().items()}
        found = gather(own)
        objects = self._objects()
        # A rank without a batch may not have created all attributes.
        for name, attribute in dict.fromkeys(itertools.chain(*found)):
            if name in objects:
                key = (name, attribute)
                parts = [gained[key] for gained in found if key in gained]
                self._merge(vars(objects[name]), attribute, self._seen[0].get(key, 0), parts)

    def _merge(
        self, own: dict[str, Any], attribute: str, before: Any, parts: list[Any]
    ) -> None:
        device = self._brain.device
        if isinstance(parts[0], list):
            # In the order of the batches, like a single process.
            turns = itertools.chain(*itertools.zip_longest(*parts, fillvalue=[]))
            added = (_on(device, value) for value in itertools.chain(*turns))
            own[attribute] = [*own.get(attribute, [])[:before], *added]
        elif any(torch.as_tensor(part).any() for part in parts):
            own[attribute] = sum((_on(device, part) for part in parts), before)

    def _gained(self, key: Key, value: Any) -> Any:
        """Returns the change of a number over all batches, or the items of a list by batch."""
        if not isinstance(value, list):
            return _on("cpu", value - self._seen[0].get(key, 0))
        values = [_on("cpu", each) for each in value]
        ends = [sizes.get(key, 0) for sizes in self._seen]
        return [values[start:end] for start, end in itertools.pairwise(ends)]

    def _sizes(self) -> dict[Key, Any]:
        return {key: _size(value) for key, value in self._values().items()}

    def _values(self) -> dict[Key, Any]:
        return {
            (name, attribute): value
            for name, obj in self._objects().items()
            for attribute, value in vars(obj).items()
            if type(value) in COUNTED
        }

    def _objects(self) -> dict[str, Any]:
        owners = {"brain": vars(self._brain), "hparams": hparams_of(self._brain)}
        return {
            f"{owner}.{name}": value
            for owner, values in owners.items()
            for name, value in values.items()
            if is_statistics(value, "append", "summarize")
        }

    def _warn_of_others(self) -> None:
        """Warns about changed attributes that are not merged and differ between ranks."""
        before, now = self._others, self._sizes_of_others()
        changed = [name for name in now if name in before and now[name] != before[name]]
        if changed:
            logger.warning(
                "--shard_eval: self.%s has changed during the validation, and is not merged "
                "over ranks. Count in an object with append() and summarize(), such as "
                "SpeechBrain's MetricStats, or leave out --shard_eval.",
                ", self.".join(changed),
            )

    def _sizes_of_others(self) -> dict[str, Any]:
        others = {name: v for name, v in vars(self._brain).items() if name not in OWN}
        objects = {
            name: _comparable_sizes(vars(value))
            for name, value in others.items()
            if hasattr(value, "__dict__") and f"brain.{name}" not in self._names
        }
        return {**objects, **_comparable_sizes(others)}


def _comparable_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns comparable sizes: small tensors become lists, large tensors are left out."""
    counted = {name: value for name, value in values.items() if type(value) in COUNTED}
    return {
        name: value.tolist() if isinstance(value, Tensor) else _size(value)
        for name, value in counted.items()
        if not isinstance(value, Tensor) or value.numel() < LARGE
    }


def _size(value: Any) -> Any:
    """Returns the length of a list, or a number or tensor on the CPU."""
    return len(value) if type(value) is list else _on("cpu", value)


def _on(device: str, value: Any) -> Any:
    """Returns a copy of a tensor on a device, and any other value unchanged."""
    return value.detach().clone().to(device) if isinstance(value, Tensor) else value
