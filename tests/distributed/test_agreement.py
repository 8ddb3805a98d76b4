"""Error messages about processes that differ, tested in a single process."""

from __future__ import annotations

from typing import Any

import pytest

from brain_lightning.distributed import agreement
from brain_lightning.errors import RankMismatchError


def test_ranks_with_the_same_value_are_named_together() -> None:
    assert agreement.by_rank([3, 4, 3]) == "ranks 0, 2: 3; rank 1: 4"


def test_one_process_agrees_with_itself() -> None:
    assert agreement.compare("fits", 3) == [3]
    agreement.check_same("fits", "epochs", 3)


def test_a_process_in_another_collective_raises_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gather(value: Any) -> list[Any]:
        return [value, "what is gathered somewhere else"]

    monkeypatch.setattr(agreement, "gather", gather)
    with pytest.raises(RankMismatchError, match=r"rank 0: fits; rank 1: does something else"):
        agreement.compare("fits", 3)
