"""What all processes have to know of a batch: one collective for everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from brain_lightning.host_copy import HostCopy

from .communication import communicates, is_distributed_initialized

# What an error has that all processes have raised.
SHARED = "brain_lightning_shared"


class Reduction:
    """Flags on their way to all processes, which do something else meanwhile.

    Args:
        flag: Of the batch; one boolean on ``device``, or the host knows it already.
        numbers: Of the caller, of each of which all processes learn the largest.
        others: What this process has to say besides.
        device: The device that processes communicate from.

    Attributes:
        largest: Of each number, known once it has been waited for.
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
            # For NCCL the device waits, and not the host.
            self._work.wait()
        self._copy = HostCopy(flags)

    def wait(self) -> list[bool]:
        """Waits for the other processes.

        Returns:
            Which of the flags, the first of them that of the batch, is raised in a process.
        """
        self._work.wait()
        first, *rest = self._copy.wait().tolist()
        self.largest, others = rest[: self._count], rest[self._count :]
        return [bool(flag) for flag in (first, *others)]


class BatchFlags:
    """The flags of one batch, each raised in all processes where one process raises it.

    The first decision of a batch that all processes share takes along what each has to say
    besides. Where a batch needs none, one is made when it is over.

    Args:
        mine: The flags of this process besides that of the batch.
    """

    def __init__(self, mine: Callable[[], Sequence[bool]] = tuple) -> None:
        # It is asked in each batch, where a single process has no time to look again.
        self._is_alone = not is_distributed_initialized()
        self._mine = mine
        self._found: Sequence[bool] | None = None

    @property
    def are_shared(self) -> bool:
        """Whether there are other processes, which do not wait for the main process."""
        return not self._is_alone and communicates()

    def reduce(
        self, flag: Tensor | bool, device: torch.device | str, numbers: Sequence[int] = ()
    ) -> Reduction:
        """Begins to tell all processes of a flag, behind what the device has in its queue.

        Args:
            flag: See ``Reduction``.
            device: See ``Reduction``.
            numbers: See ``Reduction``.
        """
        return Reduction(flag, numbers, self._mine(), device)

    def wait(self, reduction: Reduction) -> bool:
        """Waits for the other processes.

        Args:
            reduction: From ``reduce``, once.

        Returns:
            Whether the flag of the batch is raised in a process.
        """
        first, *found = reduction.wait()
        self._found = [a or b for a, b in zip(found, self._found or found, strict=True)]
        return first

    def share(self, error: BaseException) -> None:
        """Marks an error that all processes raise together.

        Args:
            error: What this process raises. It has the mark itself: what it holds must not
                be kept, and another error may have its id when it is gone.
        """
        setattr(error, SHARED, True)

    def is_everywhere(self, error: BaseException) -> bool:
        """Whether all processes have raised an error, or there is but one.

        Args:
            error: What this process has raised.
        """
        return not self.are_shared or hasattr(error, SHARED)

    def take(self, device: str) -> Sequence[bool]:
        """Ends a batch.

        Args:
            device: The device that processes communicate from.

        Returns:
            The flags besides that of the batch, as they are raised in any process.
        """
        if not self.are_shared:
            return self._mine()
        if self._found is None:
            self.wait(self.reduce(False, device))
        found, self._found = self._found, None
        assert found is not None
        return found
