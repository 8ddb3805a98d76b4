"""Flags that all ranks share in each batch. One collective reduces all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from brain_lightning.host_copy import HostCopy

from .communication import communicates, is_distributed_initialized

# Attribute of an error that all ranks raise together.
SHARED = "brain_lightning_shared"


class Reduction:
    """A reduction of flags over all ranks that runs in the background.

    Args:
        flag: Flag of the batch: a boolean, or a tensor with one boolean on ``device``.
        numbers: Numbers of the caller. All ranks get the maximum of each.
        others: The other flags of this rank.
        device: Device that the process group communicates from.

    Attributes:
        largest: Maximum of each number. Known after ``wait``.
    """

    largest: Sequence[int]

    def __init__(
        self,
        flag: Tensor | bool,
        numbers: Sequence[int],
        others: Sequence[bool],
        device: torch.device | str,
    ) -> None:
        self._count = len(numbers)
        is_known = isinstance(flag, bool)
        flags = torch.tensor([is_known and flag, *numbers, *others], dtype=torch.int32)
        flags = flags.to(device, non_blocking=True)
        if not is_known:
            flags[0] = flag
        self._work = torch.distributed.all_reduce(
            flags, torch.distributed.ReduceOp.MAX, async_op=True
        )
        if not flags.is_cpu:
            # With NCCL, this makes the device wait and not the host.
            self._work.wait()
        self._copy = HostCopy(flags)

    def wait(self) -> list[bool]:
        """Waits for the other ranks.

        Returns:
            For each flag, whether any rank has set it. The flag of the batch is the first.
        """
        self._work.wait()
        first, *rest = self._copy.wait().tolist()
        self.largest, others = rest[: self._count], rest[self._count :]
        return [bool(flag) for flag in (first, *others)]


class BatchFlags:
    """The flags of a batch. A flag counts as set if any rank sets it.

    The first collective decision of a batch also reduces the other flags of each rank. If a
    batch needs no decision, ``take`` reduces the flags at the end of the batch.

    Args:
        mine: Returns the flags of this rank, without the flag of the batch.
    """

    def __init__(self, mine: Callable[[], Sequence[bool]] = tuple) -> None:
        # Cached, because a single process would otherwise look it up in each batch.
        self._is_alone = not is_distributed_initialized()
        self._mine = mine
        self._found: Sequence[bool] | None = None

    @property
    def are_shared(self) -> bool:
        """Whether other ranks take part, as opposed to waiting for the main process."""
        return not self._is_alone and communicates()

    def reduce(
        self, flag: Tensor | bool, device: torch.device | str, numbers: Sequence[int] = ()
    ) -> Reduction:
        """Starts a reduction, which is queued after the work in the device's queue.

        Args:
            flag: See ``Reduction``.
            device: See ``Reduction``.
            numbers: See ``Reduction``.
        """
        return Reduction(flag, numbers, self._mine(), device)

    def wait(self, reduction: Reduction) -> bool:
        """Waits for the other ranks.

        Args:
            reduction: Return value of ``reduce``. Each can be waited for once.

        Returns:
            Whether any rank has set the flag of the batch.
        """
        first, *found = reduction.wait()
        self._found = [a or b for a, b in zip(found, self._found or found, strict=True)]
        return first

    def share(self, error: BaseException) -> None:
        """Marks an error that all ranks raise together.

        Args:
            error: Error that this rank raises. The mark is an attribute of the error. A set of
                errors would keep their memory, and the id of a freed error may be reused.
        """
        setattr(error, SHARED, True)

    def is_everywhere(self, error: BaseException) -> bool:
        """Returns whether all ranks have raised an error, or there is only one rank.

        Args:
            error: Error that this rank has raised.
        """
        return not self.are_shared or hasattr(error, SHARED)

    def take(self, device: str) -> Sequence[bool]:
        """Ends a batch.

        Args:
            device: Device that the process group communicates from.

        Returns:
            The flags without the flag of the batch. Each is set if any rank has set it.
        """
        if not self.are_shared:
            return self._mine()
        if self._found is None:
            self.wait(self.reduce(False, device))
        found, self._found = self._found, None
        assert found is not None
        return found
