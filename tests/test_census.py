"""Every member of SpeechBrain's Brain is there; every name that is ours gives way.

Both are found by introspection: of SpeechBrain 1, which is installed, and in the source of
SpeechBrain 0.5.16.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import speechbrain

from brain_lightning import Brain, patch_speechbrain, to_lightning
from brain_lightning.compat.versions import run_option_defaults
from brain_lightning.protocol import LightningSettings
from tests.support import speechbrain_05
from tests.support.brains import (
    Regression,
    all_equal,
    loader,
    make,
    trainer_with,
    weights,
)
from tests.support.upstream import needs_speechbrain

REFERENCE = Path(__file__).parents[1] / "examples/porting/reference.md"


def members(core: str) -> set[str]:
    """Methods of a Brain, and what they assign to it, by the source of its module."""
    tree = ast.parse(core)
    (brain,) = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == "Brain"]
    methods = {n.name for n in ast.walk(brain) if isinstance(n, ast.FunctionDef)}
    assigned = {
        n.attr
        for n in ast.walk(brain)
        if isinstance(n, ast.Attribute)
        and isinstance(n.ctx, ast.Store)
        and isinstance(n.value, ast.Name)
        and n.value.id == "self"
    }
    # SpeechBrain 0.5 assigns these by setattr.
    options = {
        key.value
        for n in ast.walk(brain)
        if isinstance(n, ast.Assign) and "run_opt_defaults" in ast.unparse(n.targets[0])
        for key in getattr(n.value, "keys", ())
    }
    return methods | assigned | options


def of_1() -> set[str]:
    brain = speechbrain.Brain(run_opts={"device": "cpu"}, hparams={})
    options = run_option_defaults(speechbrain.core).keys()
    found = members(inspect.getsource(speechbrain.core)) | {*dir(brain)} | options
    return {name for name in found if not hasattr(object, name)}


def of_05() -> set[str]:
    return members((speechbrain_05.folder() / "speechbrain/core.py").read_text())


class OurRegression(Brain):
    compute_forward = Regression.compute_forward
    compute_objectives = Regression.compute_objectives


class TheirRegression(speechbrain.Brain):
    compute_forward = Regression.compute_forward
    compute_objectives = Regression.compute_objectives


def fitted() -> Any:
    brain = make(OurRegression)
    brain.fit(range(1, 2), loader())
    return brain


@pytest.mark.parametrize("theirs", [of_1, of_05])
def test_a_member_is_there_or_the_reference_says_why_not(theirs: Any) -> None:
    names, ours = theirs(), fitted()
    assert {"fit_batch", "avg_train_loss", "max_grad_norm", "check_gradients"} <= names
    table = (
        REFERENCE.read_text().split("| Member of SpeechBrain's Brain |")[1].split("\n\n")[0]
    )
    explained = set(re.findall(r"^\| `(\w+)` \|", table, re.M))
    assert {name for name in names if not hasattr(ours, name)} <= explained
    assert not [name for name in explained if hasattr(ours, name)], "a row is out of date"


# ----------------------------------------------------------- names that a recipe may take

SETTINGS = {field.name for field in dataclasses.fields(LightningSettings)}
# What a user may look for on a Brain; SpeechBrain has it in some versions, or never had.
READABLE = {
    "rank", "world_size", "stage_type", "progress", "progress_interval", "shard_eval",
    "async_save", "accumulate_by", "oom_patience", "valid_step", "use_amp", "progressbar",
}  # fmt: skip
TAKEN = sorted(
    SETTINGS | READABLE | {"trainer", "module", "run", "callbacks", "logger", "validate"}
)


@needs_speechbrain("1.1")
def test_what_is_ours_alone_is_readable_or_private() -> None:
    ours = fitted()
    own = {name for name in {*dir(ours)} - of_1() - of_05() if not name.startswith("__")}
    # _compile_jit is SpeechBrain's, before 0.5.16.
    private = {"_lightning", "_lightning_defaults", "_compile_jit"}
    assert own <= READABLE | private


class Mine:
    """Something of a recipe's, which is no number, no option and nothing of Lightning's."""


def recipe(base: Any, how: str) -> Any:
    """A class that has each name as a thing of its own."""
    namespace: dict[str, Any] = {}
    if how == "method":
        namespace = {name: (lambda self, name=name: name) for name in TAKEN}
    elif how == "property":
        namespace = {name: property(lambda self, name=name: name) for name in TAKEN}
    elif how == "class attribute":
        namespace = dict.fromkeys(TAKEN, Mine)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        if how == "assigned before":
            vars(self).update(dict.fromkeys(TAKEN, Mine))
        base.__init__(self, *args, **kwargs)
        if how == "assigned after":
            for name in TAKEN:
                setattr(self, name, Mine)

    return type("Recipe", (base,), {**namespace, "__init__": __init__})


def is_left_alone(brain: Any, name: str, how: str) -> bool:
    found = getattr(brain, name)
    if how == "method":
        return bool(found() == name)
    return bool(found == name) if how == "property" else found is Mine


@pytest.fixture(params=[OurRegression, TheirRegression])
def base(request: pytest.FixtureRequest) -> Iterator[Any]:
    with patch_speechbrain():
        yield request.param


HOW = ["method", "property", "class attribute", "assigned before", "assigned after"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", HOW)
def test_names_of_a_recipes_own_are_left_alone(base: Any, how: str) -> None:
    def run(cls: Any) -> Any:
        brain = make(cls, hparams={})
        brain.fit(range(1, 3), loader(), loader(), trainer={"gradient_clip_val": 0.1})
        trainer_with(max_epochs=1).fit(to_lightning(brain), loader(), loader())
        brain.evaluate(loader())
        return brain

    plain, taken = run(base), run(recipe(base, how))
    assert all_equal(weights(plain), weights(taken))
    assert [name for name in TAKEN if not is_left_alone(taken, name, how)] == []


@pytest.mark.filterwarnings("ignore")
def test_hyperparameters_of_a_recipes_own_are_left_alone(
    base: Any, caplog: pytest.LogCaptureFixture
) -> None:
    own = {
        "trainer": "adam", "progress": True, "progress_interval": "weekly", "shard_eval": 3,
        "async_save": "no", "accumulate_by": "size", "oom_patience": "none", "rank": 16,
        "world_size": "large",
    }  # fmt: skip
    before = None
    for hparams in ({}, own, {**own, "trainer": Mine}, {**own, "trainer": 3}):
        brain = make(base, hparams=dict(hparams))
        brain.fit(range(1, 3), loader(), loader())
        before = before or weights(brain)
        assert all_equal(before, weights(brain))
        assert {name: getattr(brain.hparams, name) for name in hparams} == hparams
    assert "hparams['trainer']='adam' is not a Trainer" in caplog.text
