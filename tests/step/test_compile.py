"""Compiled modules: the same numbers as SpeechBrain's, and clean names."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from brain_lightning import RunOptionError, to_lightning
from tests.parity.recipes import make as make_side
from tests.parity.recipes import two_modules
from tests.parity.sides import OURS, SPEECHBRAIN, Record
from tests.support.brains import Regression, all_equal, loader, make, weights

# Warnings of torch while it compiles.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces and wraps modules as usual, but generates no code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def trained(side: Any, **run_opts: Any) -> Any:
    torch.manual_seed(0)
    brain = make_side(side, Record(), two_modules(), run_opts=run_opts)
    batches = [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0])) for _ in range(4)]
    # On both sides, a list of batches is a dataset if batch_size is None.
    brain.fit(range(2), batches, train_loader_kwargs={"batch_size": None})
    return brain


@pytest.mark.parametrize("option", ["compile", "jit"])
def test_compiled_modules_give_speechbrains_numbers(option: str) -> None:
    torch.compiler.reset()
    # Its default changed with SpeechBrain 1.1, which is ours: other kernels are generated.
    options = {option: True, "compile_using_dynamic_shape_tracing": False}
    ours, theirs = trained(OURS, **options), trained(SPEECHBRAIN, **options)
    assert all_equal(weights(ours), weights(theirs))
    assert not all_equal(weights(ours), list(two_modules()["encoder"].parameters()))


def test_the_names_in_a_lightning_checkpoint_stay_clean() -> None:
    brain, plain = make(compile=True), make()
    plain_state = to_lightning(plain).state_dict()
    plain.modules.model.weight.data.zero_()
    brain.on_fit_start()
    module = to_lightning(brain)
    assert list(module.state_dict()) == list(plain_state)
    module.load_state_dict(to_lightning(plain).state_dict())
    assert all_equal(weights(brain), weights(plain))


def test_only_the_named_modules_are_compiled(caplog: pytest.LogCaptureFixture) -> None:
    brain = make(compile=True, jit=True, compile_module_keys=["model"], jit_module_keys=[])
    brain.modules["other"] = nn.Linear(2, 2)
    brain.on_fit_start()
    assert hasattr(brain.modules.model, "_orig_mod")
    assert type(brain.modules.other) is nn.Linear
    assert "--compile_module_keys: ['model']" in caplog.text


def test_without_the_flag_the_keys_have_no_effect() -> None:
    brain = make(compile_module_keys=["nothing"])
    brain.fit(range(1), loader())
    assert brain.optimizer_step == 5


@pytest.mark.parametrize("option", ["compile", "jit"])
def test_a_key_that_is_not_an_entry_raises_an_error(option: str) -> None:
    brain = make(**{option: True, f"{option}_module_keys": ["encoder"]})
    with pytest.raises(
        RunOptionError,
        match=f"{option}_module_keys has 'encoder'.*Use some of model",
    ):
        brain.fit(range(1), loader())
    assert brain.step == 0


def test_a_module_that_cannot_be_compiled_is_scripted_instead(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    brain = make(Regression, compile=True, jit=True)
    brain.on_fit_start()
    assert isinstance(brain.modules.model, torch.jit.ScriptModule)
    assert "no compiler" in caplog.text


@pytest.mark.usefixtures("eager")
def test_modules_are_compiled_once_if_a_brain_is_fitted_twice() -> None:
    brain = make(compile=True)
    for _ in range(2):
        brain.fit(range(1), loader())
    assert type(brain.modules.model._orig_mod) is nn.Linear
    assert brain.optimizer_step == 10
