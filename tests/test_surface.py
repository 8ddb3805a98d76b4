"""The public surface: SpeechBrain's signatures, our exports, the shape of the code."""

from __future__ import annotations

import ast
import copy
import inspect
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import speechbrain
from speechbrain.utils import epoch_loop

import brain_lightning
from brain_lightning import Brain, RunOptions
from brain_lightning.compat.versions import run_option_defaults
from brain_lightning.module.named_checkpoint import Recovery
from tests.support.upstream import needs_speechbrain

PACKAGE = Path(brain_lightning.__file__).parent
# SpeechBrain 1.1.2 has 0, SpeechBrain 1.0 had 15: see the field.
OTHER_DEFAULTS = {
    "ckpt_interval_minutes": 15, "overridden_args": frozenset(), "async_save": False,
    "preflight": False, "shard_eval": False, "progress": "auto", "progress_interval": 10,
    "accumulate_by": "batches", "oom_patience": None,
}  # fmt: skip

# SpeechBrain 0.5 gives check_gradients the loss.
EXTRA_ARGUMENTS = {
    "fit": [("trainer", None)],
    "evaluate": [("trainer", None), ("ckpt", Recovery.BY_KEYS)],
    "check_gradients": [("loss", None)],
}


def public_methods(cls: type) -> list[str]:
    return [n for n, m in inspect.getmembers(cls, callable) if not n.startswith("_")]


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    signature = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in signature]


# Copied before any test runs: SpeechBrain's evaluate writes into its own default argument.
SPEECHBRAIN_SIGNATURES = {
    name: copy.deepcopy(parameters(getattr(speechbrain.Brain, name)))
    for name in ["__init__", *public_methods(speechbrain.Brain)]
}


@pytest.mark.parametrize("name", SPEECHBRAIN_SIGNATURES)
def test_every_method_has_speechbrains_signature(name: str) -> None:
    theirs = SPEECHBRAIN_SIGNATURES[name]
    ours = parameters(getattr(Brain, name))
    extra = [(name, default) for name, kind, default in ours[len(theirs) :]]
    assert ours[: len(theirs)] == theirs
    assert extra == EXTRA_ARGUMENTS.get(name, [])


@pytest.mark.parametrize("name", ["EpochCounter", "EpochCounterWithStopper"])
def test_counters_have_speechbrains_signatures(name: str) -> None:
    theirs, ours = getattr(epoch_loop, name), getattr(brain_lightning, name)
    for method in ["__init__", *public_methods(theirs)]:
        assert parameters(getattr(ours, method)) == parameters(getattr(theirs, method))


@needs_speechbrain("1.1")
def test_every_run_option_of_speechbrain_is_there_with_its_default() -> None:
    expected = {**run_option_defaults(speechbrain.core), **OTHER_DEFAULTS}
    assert RunOptions().as_dict() == expected


def test_a_recipes_class_may_have_any_metaclass() -> None:
    class Meta(type):
        pass

    class Generic(typing.Generic[typing.TypeVar("T")], Brain, metaclass=Meta):
        pass

    assert type(Brain) is type(speechbrain.Brain) is type
    assert Generic(run_opts={"device": "cpu"}).step == 0


def test_every_run_option_is_an_attribute() -> None:
    brain = Brain(run_opts={"device": "cpu"})
    for name in run_option_defaults(speechbrain.core).keys() - {
        "param_file",
        "overridden_args",
    }:
        assert hasattr(brain, name), name


def test_exports_are_sorted_complete_and_there() -> None:
    assert brain_lightning.__all__ == sorted(brain_lightning.__all__)
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]
    # `X as X`: a type checker takes any other import of a stub for a private one.
    homes = {alias.asname: node.module for node in imports for alias in node.names}
    assert imports == tree.body[1:]
    assert homes.keys() == set(brain_lightning.__all__) <= set(dir(brain_lightning))
    starred: dict[str, object] = {}
    exec("from brain_lightning import *", starred)  # noqa: S102
    assert starred.keys() >= homes.keys()
    for name, module in homes.items():
        assert getattr(brain_lightning, name).__module__ == f"brain_lightning.{module}"
    with pytest.raises(AttributeError, match="has no attribute 'brain_lighting'"):
        brain_lightning.brain_lighting  # noqa: B018


def test_the_package_may_be_in_a_zip(tmp_path: Path) -> None:
    zipped = shutil.make_archive(str(tmp_path / "p"), "zip", PACKAGE.parent, "brain_lightning")
    code = (
        f"import sys; sys.path.insert(0, {zipped!r}); from brain_lightning import Brain, brain"
    )
    code += "; print(Brain, brain.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"brain_lightning.brain.brain.Brain'> {zipped}" in done.stdout, done.stderr


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom brain_lightning.cli.main import main\n"
        "try:\n    main(['--help'])\nfinally:\n    assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "brain-lightning run train.py" in done.stdout


def test_speechbrain_is_never_imported() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(a.name.startswith("speechbrain") for a in node.names), path
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("speechbrain"), path
