"""Recipes of SpeechBrain 0.5: their bits are those of SpeechBrain 0.5.16's own loop.

That runs in a process of its own, which records; here the same recipes run on our Brain and
on SpeechBrain 1's, patched.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import speechbrain
import torch
from speechbrain.utils import checkpoints

import brain_lightning
from brain_lightning import Brain, Stage, patch_speechbrain
from tests.parity import older_recipes
from tests.parity.older_recipes import RECIPES, Side
from tests.support import speechbrain_05
from tests.support.processes import check_python

# SpeechBrain's own.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What SpeechBrain 0.5.16 gives, by the recipe's name."""
    file = tmp_path_factory.mktemp("recorded") / "recorded.pt"
    recipes = str(Path(__file__).with_name("older_recipes.py"))
    # Not forked, for the other process has SpeechBrain 1 loaded.
    check_python("-W", "ignore", recipes, str(speechbrain_05.folder()), str(file), real=True)
    return torch.load(file)


@pytest.fixture(params=["ours", "patched"])
def side(request: pytest.FixtureRequest) -> Iterator[Side]:
    if request.param == "ours":
        yield Side(Brain, Stage, brain_lightning)
    else:
        with patch_speechbrain():
            yield Side(speechbrain.Brain, speechbrain.Stage, checkpoints)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_a_fit_batch_of_0_5_gives_its_bits(
    recipe: Any, side: Side, recorded: dict[str, Any]
) -> None:
    assert_equal(recorded[recipe.__name__], recipe(side), recipe.__name__)


def test_a_trainers_precision_is_what_a_fit_batch_of_0_5_branches_on(
    side: Side, recorded: dict[str, Any]
) -> None:
    brain = older_recipes.defaults(side)({"model": older_recipes.model()}, older_recipes.adam,
                                         run_opts={"device": "cpu"})  # fmt: skip
    found = older_recipes.train(brain, trainer={"precision": "bf16-mixed"})
    # Validation is in bf16 too, which SpeechBrain 0.5 could not do.
    for name in ("weights", "optimizers"):
        assert_equal(recorded["in_bf16"][name], found[name], name)
    assert not all(map(torch.equal, found["weights"], recorded["default"]["weights"]))


def assert_equal(expected: Any, found: Any, where: str) -> None:
    """The same values and tensors, however they are nested."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(expected, found), where
    elif isinstance(expected, dict):
        assert expected.keys() == found.keys(), where
        for name in expected:
            assert_equal(expected[name], found[name], f"{where}[{name!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(expected) == len(found), where
        for index, pair in enumerate(zip(expected, found, strict=True)):
            assert_equal(*pair, f"{where}[{index}]")
    else:
        assert expected == found or (expected != expected and found != found), where
