"""What each of several processes takes of the data, and what all of them found.

``--shard_eval`` shares the batches of a validation out. They are the batches of one
process, each evaluated once: losses and rates are those of one process.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
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

# Elements of a tensor that nobody counts with.
LARGE = 100


def draws_together(length: float | None) -> bool:
    """Whether processes have to ask each other whether all have a next batch.

    Args:
        length: Training batches of this process; None where that is not known.

    Returns:
        True where some length is not known.

    Raises:
        UnequalDataError: One process has more batches than another, and would wait for
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


def share(batches: float) -> float:
    """How many of some batches this process has.

    Args:
        batches: All of them; may be infinite.
    """
    return batches if math.isinf(batches) else max(0, -((rank() - batches) // world_size()))


class Shard:
    """The part of a loader's batches that is this process's: every so many.

    Args:
        loader: Gives the same batches in every process.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return int(share(len(self._loader)))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self._loader, DataLoader) and _draws_indices(self._loader):
            return iter(_with_every_nth(self._loader))
        return _every_nth(self._loader)


def _every_nth(batches: Iterable[Any]) -> Iterator[Any]:
    return itertools.islice(batches, rank(), None, world_size())


def _draws_indices(loader: DataLoader[Any]) -> bool:
    return not isinstance(loader.dataset, IterableDataset)


def _with_every_nth(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A copy that loads no batch of another process."""
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    shared = {name: _EveryNth(getattr(loader, name))}
    return twin(loader, persistent_workers=False, **shared)


class _EveryNth:
    def __init__(self, sampler: Iterable[Any]) -> None:
        self._sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        return _every_nth(self._sampler)

    def __len__(self) -> int:
        return len(Shard(self._sampler))


def synchronize_buffers(brain: BrainProtocol) -> None:
    """Gives every process the first one's buffers, as the first evaluation batch would.

    The wrapper does so in its forward pass, in which processes with fewer batches do
    not take part.

    Args:
        brain: The Brain at the start of a stage that is shared out.
    """
    for module in brain.modules.values():
        if isinstance(module, DistributedDataParallel) and module.broadcast_buffers:
            for buffer in module.modules_buffers:
                torch.distributed.broadcast(buffer, src=0)
            module.require_forward_param_sync = False


class SharedStatistics:
    """The statistics of a stage that is shared out, brought together at its end.

    An object counts that has SpeechBrain's interface of ``MetricStats``, as an attribute
    of the Brain or in ``hparams``. Its lists become what one process would have, in the
    same order; numbers that have changed are added up.

    Args:
        brain: The Brain, after ``on_stage_start``.
    """

    def __init__(self, brain: BrainProtocol) -> None:
        self._brain = brain
        # The numbers and the lengths of lists, at first and after each batch.
        self._seen = [self._look()]
        self._others = self._look_at_others()

    def after_batch(self) -> None:
        """Takes note of what a batch has added."""
        self._seen.append(self._look())

    def gather(self) -> None:
        """Gives every process what all of them have."""
        self._tell_of_others()
        objects = self._objects()
        found = gather({name: self._gained(name, obj) for name, obj in objects.items()})
        for name, obj in objects.items():
            gained = [each.get(name, {}) for each in found]
            # A process without a batch may not have made all of them.
            for attribute in dict.fromkeys(itertools.chain(*gained)):
                parts = [each[attribute] for each in gained if attribute in each]
                before = self._seen[0].get(name, {}).get(attribute, 0)
                self._merge(obj, attribute, before, parts)

    def _merge(self, obj: Any, attribute: str, before: Any, parts: list[Any]) -> None:
        own = vars(obj)
        if isinstance(parts[0], list):
            # Batch after batch, each of which one process has had.
            turns = itertools.chain(*itertools.zip_longest(*parts, fillvalue=[]))
            added = (_on(self._brain.device, value) for value in itertools.chain(*turns))
            own[attribute] = [*own.get(attribute, [])[:before], *added]
        elif any(torch.as_tensor(part).any() for part in parts):
            own[attribute] = sum((_on(self._brain.device, part) for part in parts), before)

    def _gained(self, name: str, obj: Any) -> dict[str, Any]:
        """What each batch has added to a list, and all of them to a number."""
        begun = self._seen[0].get(name, {})
        return {
            attribute: self._pieces(name, attribute, value)
            if isinstance(value, list)
            else _on("cpu", value - begun.get(attribute, 0))
            for attribute, value in vars(obj).items()
            if type(value) in COUNTED
        }

    def _pieces(self, name: str, attribute: str, values: list[Any]) -> list[list[Any]]:
        ends = [seen.get(name, {}).get(attribute, 0) for seen in self._seen]
        values = [_on("cpu", value) for value in values]
        return [values[start:end] for start, end in itertools.pairwise(ends)]

    def _look(self) -> dict[str, dict[str, Any]]:
        return {name: _sizes(obj) for name, obj in self._objects().items()}

    def _tell_of_others(self) -> None:
        """What a recipe counts in another way would differ between processes."""
        before, now = self._others, self._look_at_others()
        changed = [name for name in now if name in before and now[name] != before[name]]
        if changed:
            logger.warning(
                "--shard_eval: self.%s has changed during the validation and is not brought "
                "together: each process has its own. Count in an object with append() and "
                "summarize(), as SpeechBrain's MetricStats, or leave --shard_eval out.",
                ", self.".join(changed),
            )

    def _look_at_others(self) -> dict[str, Any]:
        own = vars(self._brain).items()
        others = {name: value for name, value in own if name not in OWN}
        objects = {
            name: _plain_sizes(vars(value))
            for name, value in others.items()
            if hasattr(value, "__dict__") and f"brain.{name}" not in self._seen[0]
        }
        return {**objects, **_plain_sizes(others)}

    def _objects(self) -> dict[str, Any]:
        return {
            f"{where}.{name}": value
            for where, owner in (
                ("brain", vars(self._brain)),
                ("hparams", hparams_of(self._brain)),
            )
            for name, value in owner.items()
            if is_statistics(value, "append", "summarize")
        }


# What statistics count in.
COUNTED = (list, int, float, Tensor)


def _sizes(obj: Any) -> dict[str, Any]:
    """The numbers, and the lengths of the lists, of an object."""
    return {
        name: len(value) if type(value) is list else _on("cpu", value)
        for name, value in vars(obj).items()
        if type(value) in COUNTED
    }


def _plain_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same in what can be compared; a tensor that is large is no count."""
    return {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in _sizes(SimpleNamespace(**values)).items()
        if not isinstance(value, Tensor) or value.numel() < LARGE
    }


def _on(device: str, value: Any) -> Any:
    """A tensor, as a copy of its own, on a device; anything else as it is."""
    return value.detach().clone().to(device) if isinstance(value, Tensor) else value


def shared_average(average: float, batches: int) -> float:
    """The average loss over the batches of all processes.

    Args:
        average: Over the batches of this one.
        batches: How many these are.
    """
    found = gather((average, batches))
    total = sum(count for _, count in found)
    return sum(mean * count for mean, count in found) / total if total else 0.0
