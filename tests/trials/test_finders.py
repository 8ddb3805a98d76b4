"""Lightning's finders with a Brain: what they find, and that they leave nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.sides import SPEECHBRAIN

from .tried import GAN, SEARCHES, search

KINDS: dict[str, dict[str, Any]] = {
    "ours": {},
    "speechbrain": {"side": SPEECHBRAIN},
    "gan": GAN,
}


@pytest.mark.parametrize("hooks", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("kind", SEARCHES)
def test_a_search_leaves_nothing_behind(tmp_path: Path, kind: str, hooks: Any) -> None:
    brain, watched, error = search(tmp_path, kind, **hooks)
    assert error is None, error
    assert len(watched.found) == 1
    assert watched.before == watched.after
    assert watched.before[0]["logged"] > 0
    assert [name for name, *_ in brain.ends] == ["TRAIN", "VALID"] * 2


ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    KeyboardInterrupt(),
    OSError("a file is missing"),
)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", SEARCHES)
def test_an_error_leaves_nothing_behind(
    tmp_path: Path, kind: str, error: BaseException
) -> None:
    _, watched, raised = search(tmp_path, kind, error=error)
    assert watched.before == watched.after
    assert watched.before[0]["logged"] > 0
    if kind == "size" and isinstance(error, torch.OutOfMemoryError):
        # Every size is too large.
        assert "no memory for the smallest batch" in str(raised)
    else:
        assert raised is error or isinstance(raised.__context__, type(error))
