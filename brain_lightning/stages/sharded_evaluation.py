"""Validation that is sharded over ranks (``--shard_eval``), and training on unequal data.

Together, the ranks evaluate the batches that one process would, each of them once:
losses and rates are those of one process.
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

# The name of an object of statistics, and of its attribute.
Key = tuple[str, str]

# What statistics count in.
COUNTED = (list, int, float, Tensor)
# A tensor with as many elements is not used for counting.
LARGE = 100


def fetches_collectively(length: float | None) -> bool:
    """Whether ranks have to ask each other whether all have a next training batch.

    Args:
        length: Training batches of this rank; None where that is not known.

    Returns:
        True where some length is not known.

    Raises:
        UnequalDataError: One rank has more batches than another, and would wait for
            its gradients for ever.
    """
    lengths = gather(length)
    if None in lengths:
        return world_size() > 1
    if len(set(lengths)) > 1:
        raise UnequalDataError(
            f"the processes have {', '.join(map(str, lengths))} training batches, in order "
            "of their ranks, and have to have as many: drop_last=True leaves the rest out, a "
            "DistributedSampler repeats some, and Trainer(limit_train_batches="
            f"{min(lengths)}) ends the epoch for all"
        )
    return False


def shard_length(batches: float) -> float:
    """How many of some batches this rank has.

    Args:
        batches: All of them; may be infinite.
    """
    return batches if math.isinf(batches) else max(0, -((rank() - batches) // world_size()))


class Shard:
    """The part of some batches, or of a sampler, that is this rank's: every so many.

    Args:
        loader: Yields the same batches on every rank.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return int(shard_length(len(self._loader)))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        loader = self._loader
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            # A copy that loads no batch of another rank.
            name = "sampler" if loader.batch_sampler is None else "batch_sampler"
            shard = {name: Shard(getattr(loader, name))}
            return iter(twin(loader, persistent_workers=False, **shard))
        return itertools.islice(loader, rank(), None, world_size())


def synchronize_buffers(brain: BrainProtocol) -> None:
    """Broadcasts the first rank's buffers, as the first evaluation batch would.

    The wrapper does so in its forward pass, in which ranks with fewer batches do not
    take part.

    Args:
        brain: The Brain at the start of a sharded stage.
    """
    for module in brain.modules.values():
        if isinstance(module, DistributedDataParallel) and module.broadcast_buffers:
            for buffer in module.modules_buffers:
                torch.distributed.broadcast(buffer, src=0)
            module.require_forward_param_sync = False


def average_over_ranks(average: float, batches: int) -> float:
    """The average loss over the batches of all ranks.

    Args:
        average: Over the batches of this one.
        batches: How many these are.
    """
    found = gather((average, batches))
    total = sum(count for _, count in found)
    return sum(mean * count for mean, count in found) / total if total else 0.0


class ShardedStatistics:
    """The statistics of a sharded stage, merged over ranks at its end.

    These are the objects with the interface of SpeechBrain's ``MetricStats``, as an
    attribute of the Brain or in ``hparams``. Their lists become what one process would
    have, in the same order; numbers that have changed are added up.

    Args:
        brain: The Brain, after ``on_stage_start``.
    """

    def __init__(self, brain: BrainProtocol) -> None:
        self._brain = brain
        self._names = self._objects().keys()
        # The numbers and the lengths of lists, at first and after each batch.
        self._seen = [self._sizes()]
        self._others = self._sizes_of_others()

    def after_batch(self) -> None:
        """Records what a batch has added."""
        self._seen.append(self._sizes())

    def merge(self) -> None:
        """Gives every rank what all of them have."""
        self._warn_of_others()
        own = {key: self._gained(key, value) for key, value in self._values().items()}
        found = gather(own)
        objects = self._objects()
        # A rank without a batch may not have made all attributes.
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
            # Batch after batch, as one process would have them.
            turns = itertools.chain(*itertools.zip_longest(*parts, fillvalue=[]))
            added = (_on(device, value) for value in itertools.chain(*turns))
            own[attribute] = [*own.get(attribute, [])[:before], *added]
        elif any(torch.as_tensor(part).any() for part in parts):
            own[attribute] = sum((_on(device, part) for part in parts), before)

    def _gained(self, key: Key, value: Any) -> Any:
        """What all batches have added to a number, and each of them to a list."""
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
        """What a recipe counts in another way would differ between ranks."""
        before, now = self._others, self._sizes_of_others()
        changed = [name for name in now if name in before and now[name] != before[name]]
        if changed:
            logger.warning(
                "--shard_eval: self.%s has changed during the validation and is not brought "
                "together: each process has its own. Count in an object with append() and "
                "summarize(), as SpeechBrain's MetricStats, or leave --shard_eval out.",
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
    """The sizes among some values, with small tensors as lists and without large ones."""
    counted = {name: value for name, value in values.items() if type(value) in COUNTED}
    return {
        name: value.tolist() if isinstance(value, Tensor) else _size(value)
        for name, value in counted.items()
        if not isinstance(value, Tensor) or value.numel() < LARGE
    }


def _size(value: Any) -> Any:
    """The length of a list; a number as it is, on the CPU."""
    return len(value) if type(value) is list else _on("cpu", value)


def _on(device: str, value: Any) -> Any:
    """A copy of a tensor on a device; anything else as it is."""
    return value.detach().clone().to(device) if isinstance(value, Tensor) else value
