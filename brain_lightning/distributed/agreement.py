"""Whether all processes are at the same place of a run, and what each of them found there.

A process that waits for another one, which is elsewhere, waits for ever. So each says
what it is about to do, together with what it has to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from brain_lightning.errors import RankMismatchError

from .communication import gather

# What to do where processes are in different states.
REMEDY = (
    "let each of them recover the same checkpoint, with recover_if_possible of the Brain's "
    "checkpointer, and give each the same epoch counter"
)


class _Said(NamedTuple):
    """What a process does, and what it found."""

    doing: str
    found: Any


def compare(doing: str, found: Any) -> list[Any]:
    """What all processes found, each of which does the same.

    Args:
        doing: What this process does, such as ``recovers a checkpoint``.
        found: Anything that can be pickled.

    Returns:
        What each process found, in the order of their ranks.

    Raises:
        RankMismatchError: Another process does something else.
    """
    everything = gather(_Said(doing, found))
    done = [each.doing if isinstance(each, _Said) else "is elsewhere" for each in everything]
    if any(each != doing for each in done):
        raise RankMismatchError(
            f"the processes are not at the same place ({by_rank(done)}), and would wait for "
            "each other for ever: let no process leave out what the others do in on_fit_start"
        )
    return [each.found for each in everything]


def by_rank(values: Sequence[Any]) -> str:
    """Which ranks have which value, in words.

    Args:
        values: One for each rank.

    Returns:
        Such as ``rank 0: 3; ranks 1, 2: 4``.
    """
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(str(value), []).append(str(rank))
    return "; ".join(
        f"rank{'s' * (len(numbers) > 1)} {', '.join(numbers)}: {value}"
        for value, numbers in ranks.items()
    )


def check_same(doing: str, what: str, value: Any) -> None:
    """Ends the run where the processes do not have the same value.

    Args:
        doing: What this process does.
        what: What the value is.
        value: That of this process.

    Raises:
        RankMismatchError: Another process has another one, or is elsewhere.
    """
    values = compare(doing, value)
    if any(each != values[0] for each in values):
        raise RankMismatchError(
            f"the processes differ in {what} ({by_rank(values)}): {REMEDY}"
        )
