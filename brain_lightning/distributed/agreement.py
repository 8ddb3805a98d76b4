"""Checks that all ranks are at the same point of a run, and exchanges values at that point.

If a rank waits in a collective that another rank does not reach, it hangs. Therefore each rank
sends the name of its action along with its value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from brain_lightning.errors import RankMismatchError

from .communication import gather

# The remedy if ranks are in different states.
REMEDY = (
    "Recover the same checkpoint on every rank, with recover_if_possible of the Brain's "
    "checkpointer, and use the same epoch counter on every rank."
)


class _Action(NamedTuple):
    """The action of a rank, and its value."""

    doing: str
    found: Any


def compare(doing: str, found: Any) -> list[Any]:
    """Gathers a value of each rank, after checking that all ranks take the same action.

    Args:
        doing: Action of this rank, such as ``recovers a checkpoint``.
        found: Value of this rank. Any object that can be pickled.

    Returns:
        The values of all ranks, in the order of the ranks.

    Raises:
        RankMismatchError: Another rank does something else.
    """
    everything = gather(_Action(doing, found))
    done = [
        each.doing if isinstance(each, _Action) else "does something else"
        for each in everything
    ]
    if any(each != doing for each in done):
        raise RankMismatchError(
            f"the ranks are at different points of the run ({by_rank(done)}) and would "
            "hang. In on_fit_start, call the same methods on all ranks, with no "
            "`if rank == 0:` around them."
        )
    return [each.found for each in everything]


def by_rank(values: Sequence[Any]) -> str:
    """Describes which ranks have which value.

    Args:
        values: One value per rank.

    Returns:
        A string such as ``rank 0: 3; ranks 1, 2: 4``.
    """
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(str(value), []).append(str(rank))
    return "; ".join(
        f"rank{'s' * (len(numbers) > 1)} {', '.join(numbers)}: {value}"
        for value, numbers in ranks.items()
    )


def check_same(doing: str, what: str, value: Any) -> None:
    """Raises an error if a value is not the same on all ranks.

    Args:
        doing: Action of this rank.
        what: Name of the value, for the error message.
        value: Value of this rank.

    Raises:
        RankMismatchError: Another rank has another value or does something else.
    """
    values = compare(doing, value)
    if any(each != values[0] for each in values):
        raise RankMismatchError(f"the ranks differ in {what} ({by_rank(values)}). {REMEDY}")
