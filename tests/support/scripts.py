"""Recipes that know nothing of Lightning, and what they leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

RECIPES = Path(__file__).parent / "recipes"
TOY = [str(RECIPES / "toy.py"), str(RECIPES / "toy.yaml")]
QUIET = ["--device=cpu", "--noprogressbar"]


def script(folder: Path, text: str, name: str = "train.py") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def result(folder: Path, rank: int = 0) -> dict[str, Any]:
    """What the toy recipe has learned."""
    return torch.load(folder / f"rank{rank}.pt", weights_only=True)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    weights = zip(one["weights"].values(), other["weights"].values(), strict=True)
    return one["loss"] == other["loss"] and all(torch.equal(a, b) for a, b in weights)
